"""YAML from a run's folder: whatever text a configuration holds is read back, and no file takes long."""

from __future__ import annotations

import os

import pytest
import yaml

from conf import yaml_files
from conf.ablation_schema import AblationConfig
from conf.group import read_group
from conf.load import FOLDER, from_yaml, load, to_yaml, values_of
from conf.validate import validate
from kernels.common.errors import UserError

TEXTS = ["${x}", "\\${x}", "\\\\${x}", "${", "${oc.env:HOME}", "a ${b ${c}", "$", "\\", "it's", "1e5", "null", "~", "", " a ",
         "*a", "&a", "- a", "a: b", "# a", "a\nb\r\x1b[31m\x85\u2028\t \x00", "🙂 é", "'", '"', "%",
         "!!int 5", "\udc80"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_read_back(text, tmp_path):
    config = load(["run=x"])
    config.prompts, config.logger.tags, config.ffn.parameters = [text], [text, text], {"b": text, text: 1}
    config.data.path = config.tokenizer.path = config.runs = text
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(tmp_path / "config.yaml") == config
    assert values_of(tmp_path / "config.yaml")["runs"] == text


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_libyaml_reads_what_pyyaml_reads():
    """All that it can read: half a surrogate pair is left to PyYAML."""
    fast, full = yaml_files._loaders(as_text=False)
    config = load(["run=x"])
    config.prompts = TEXTS[:-1]
    files = [path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.yaml")]
    for text in (to_yaml(config), *files, "a: 1e-5\nb: 2026-01-01\nc: 0x1F\nd: 1_000\ne: on\nf: .inf\n1: ~", ""):
        assert yaml.load(text, Loader=fast) == yaml.load(text, Loader=full)


def test_an_escaped_interpolation_on_the_command_line_survives_a_resume(tmp_path):
    config = load([f"runs={tmp_path}", "run=x", r"prompts=['\${x}']"])
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "metrics.jsonl").touch()
    assert load([f"runs={tmp_path}", "run=x", "steps=7"]).prompts == config.prompts == ["${x}"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nprompts: [*b, *b]", "an alias"),
        ("[" * 50_000, "more than 20 nested"),
        ("- " * 5_000, "more than 20 nested"),
        ("prompts:\n" + "- a\n" * 20_000, "more than 10,000 values"),
        ("x" * (yaml_files.MOST_BYTES + 1), "more than 524,288 bytes"),
        ("steps: " + "9" * 5_000, "a number has 5,000 characters"),
        ("steps: 1" + ":59" * 5_000, "a number has"),
        ("run: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("run: !!python/object/apply:pathlib.Path [x]", "could not determine a constructor"),
        ("run: !!int ''", "does not fit its tag"),
        ("run: !!bool x", "does not fit its tag"),
        ("run: !!timestamp 2001-99-99", "does not fit its tag"),
        ("a: 1\na: 2", "while constructing a mapping"),
        ("[a", "while parsing"),
        ("5", "holds no keys and values"),
        ("\x00", "special characters"),
    ],
)
def test_a_file_that_would_take_long_or_run_code_is_refused(content, reason, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="utf-8")
    for read in (from_yaml, values_of):
        with pytest.raises(UserError, match=reason):
            read(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "[Ii]s a directory|not a regular file")):
        with pytest.raises(UserError, match=reason):
            from_yaml(path)


@pytest.mark.parametrize(
    "value", ["{a: &a [1], b: *a}", "[" * 500, "[1", "9" * 5000, "!!python/name:os.system", "${x}"]
)
def test_a_typed_value_of_a_plan_is_bounded_too(value):
    with pytest.raises(UserError):
        read_group("ablation", AblationConfig, ["ablation=smoke", f"ablation.rates={value}"], "plan")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("optim.lr=" + "9" * 400, "optim.lr: the number is too large"),
        ("optim.lr=" + "9" * 5000, "optim.lr"),
        ("steps=" + "9" * 400, "steps is beyond 64-bit arithmetic"),
        ("steps=" + "9" * 5000, "steps"),
        ("tokenizer.bos=[" + "9" * 5000 + "]", "tokenizer.bos has a number of 5,000 digits"),
        ("seed=-" + "9" * 30, "seed is beyond 64-bit arithmetic"),
        ("model.n_layers=1e9", "at most 10,000 layers are built"),
        ("tokenizer.path=\udc80", "is not UTF-8"),
        ("\udc80=1", "is not UTF-8"),
    ],
)
def test_numbers_and_texts_that_nothing_holds_are_refused(word, reason):
    with pytest.raises(UserError, match=reason) as caught:
        validate(load([word]), 1)
    assert len(str(caught.value)) < 7000


def test_the_value_of_a_secret_variable_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    for typed in ("prompts=['0123456789abcdef']", "logger.entity=${oc.env:WANDB_API_KEY}", "run=x-0123456789abcdef"):
        with pytest.raises(UserError, match="holds the value of WANDB_API_KEY"):
            load([typed])
