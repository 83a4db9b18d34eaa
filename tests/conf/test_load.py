"""From words to a typed configuration: what composes, what is refused and with which sentence, and how a run is named."""

from __future__ import annotations

import re
import shutil
import typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import conf.keys
import conf.load
from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.keys import FOLDER, choices, keys
from conf.load import find_run, flatten, from_yaml, load, to_dict, to_yaml, values_of
from conf.schema import GROUPS, Config
from conf.validate import validate
from kernels.common.errors import UserError

# What a choice needs beside its name.
NEEDS = {
    "ffn=custom": ["ffn.formula=x*sigmoid(1.702*x)"],
    "data=text": ["data.path=notes"],
    "data=jsonl": ["data.path=notes"],
    "data=parquet": ["data.path=notes"],
    "data=hf": ["data.path=notes"],
    "data=blend": ["data.parts.code.path=src", "data.parts.code.source=text"],
    "tokenizer=huggingface": ["tokenizer.path=tokenizer.json"],
}
ALL_CHOICES = [f"{group}={choice}" for group in GROUPS for choice in choices(group)]


def refusal(*argv: str) -> str:
    """Return the sentence with which these words are refused."""
    with pytest.raises(UserError) as caught:
        validate(load(list(argv)), 1)
    return str(caught.value)


def read_back(config: Config, path: Path) -> Config:
    path.write_text(to_yaml(config), encoding="utf-8")
    return from_yaml(path)


@pytest.mark.parametrize("choice", ALL_CHOICES)
def test_every_choice_of_every_group_composes_validates_and_reads_back(choice, tmp_path):
    config = load([choice, *NEEDS.get(choice, [])])
    validate(config, 1)
    assert read_back(config, tmp_path / "config.yaml") == config
    group, _, name = choice.partition("=")
    values = flatten(to_dict(config))
    raw = OmegaConf.to_container(OmegaConf.load(FOLDER / group / f"{name}.yaml"))
    # A preset is a whole recipe, set over the other groups; a choice of another group sets its own keys.
    raw.pop("defaults", None)  # which choices of other groups it takes
    expected = flatten(raw if group == "model" else {group: raw})
    typed = {word.partition("=")[0] for word in NEEDS.get(choice, [])}
    found = {key: values[key] for key in expected if key not in typed and expected[key] not in ({}, "???")}
    assert found == {key: expected[key] for key in found}
    assert len(found) >= 1


def test_the_groups_are_the_folders():
    # Plans are read by ablation/plan.py, clusters by launch/slurm.py.
    assert sorted([*GROUPS, "ablation", "cluster"]) == sorted(
        path.name for path in FOLDER.iterdir() if list(path.glob("*.yaml"))
    )


@pytest.mark.parametrize("group", ["ffn", "model", "data", "tokenizer", "optim", "schedule", "precision", "logger"])
def test_a_choice_is_called_what_its_file_is_called(group):
    for choice in choices(group):
        raw = OmegaConf.to_container(OmegaConf.load(FOLDER / group / f"{choice}.yaml"))
        assert (raw[group] if group == "model" else raw)["name"] == choice


def test_what_is_typed_wins_over_a_preset():
    words = ["zero=2", "optim=adamw", "optim.lr=0.5", "schedule=wsd", "sequence_length=64", "model.n_layers=1"]
    for preset in choices("model"):
        config = load([*words[:3], f"model={preset}", *words[3:]])
        assert (config.zero.stage, config.optim.name, config.optim.lr) == (2, "adamw", 0.5)
        assert (config.schedule.name, config.sequence_length, config.model.n_layers) == ("wsd", 64, 1)
        assert config.model.name == preset


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["ffn=swigluu"], "unknown ffn 'swigluu': did you mean 'swiglu'?"),
        (["model=nanno"], "unknown model 'nanno': did you mean 'nano'?"),
        (["zero=4"], "unknown zero '4': choose from 0, 1, 2, 3, offload"),
        (["ffn="], "unknown ffn ''"),
        (["ffn=relu,silu"], "unknown ffn 'relu,silu'"),
        (["optim.lrr=1"], "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
        (["stepz=1"], "unknown key 'stepz': did you mean 'steps'?"),
        (["modle=nano"], "unknown key 'modle': did you mean 'model'?"),
        (["lr=1e-3"], "unknown key 'lr': did you mean 'optim.lr'?"),
        (["vocab_size=64"], "did you mean 'model.vocab_size' or 'tokenizer.vocab_size'?"),
        (["hydra.run.dir=x"], "unknown key 'hydra.run.dir'"),
        (["ffn@model=relu"], "unknown key 'ffn@model'"),
        (["--multirum"], "unknown option '--multirum'"),
        (["-m"], "unknown option '-m'"),
        (["steps"], "'steps' is not an override"),
        (["~steps"], "'~steps' is not an override"),
        ([""], "'' is not an override"),
    ],
)
def test_what_is_unknown_is_named_with_what_is_near(words, near):
    assert near in refusal(*words)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("steps=abc", "steps=abc: expected a whole number"),
        ("steps=1.5", "steps=1.5: expected a whole number"),
        ("steps=1e-3", "expected a whole number"),
        ("steps=", "steps=: expected a whole number"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("model.qk_norm=maybe", "model.qk_norm=maybe: expected true or false"),
        ("steps=1,2", "steps=1,2 has several values"),
        ("optim.scaling=mup,none", "optim.scaling=mup,none has several values"),
        ("steps=[1", "cannot parse 'steps=[1'"),
        ("model.d_model=null", "model.d_model=null: expected a value"),
        ("seed={a: 1}", "seed={'a': 1}: expected a whole number"),
        ("data.parts=[1]", "data.parts: expected a dictionary, {name: value}"),
        ("logger.tags={a: 1}", "logger.tags: expected a list of texts, [one,two]"),
        ("prompts={a: 1}", "prompts={...} must be a list of texts"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(word, sentence):
    found = refusal(word)
    assert sentence in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("typed", "value"), [("1e6", 10**6), ("1E6", 10**6), ("1.5e3", 1500), (".5e1", 5), ("1e+4", 10**4), ("4096", 4096)]
)
def test_a_whole_number_may_be_typed_with_an_exponent(typed, value):
    assert load([f"tokens={typed}"]).tokens == value


def test_one_length_is_typed_and_wins_over_the_presets(tmp_path, monkeypatch):
    assert "both steps and tokens" in refusal("steps=5", "tokens=1e6")
    assert "both steps and tokens" in refusal("+tokens=1e6", "steps=5")
    assert [(c.steps, c.tokens) for c in (load(["steps=5", "tokens=null"]), load(["steps=null", "tokens=1M"]))] == [
        (5, None),
        (None, 10**6),
    ]
    # Beside the presets there are, one that is given in steps.
    folder = shutil.copytree(FOLDER, tmp_path / "conf")
    (folder / "model" / "short.yaml").write_text("# @package _global_\nmodel: {name: short}\nsteps: 30\n")
    for module in (conf.keys, conf.load):
        monkeypatch.setattr(module, "FOLDER", folder)
    for preset in ("nano", "short"):
        by_tokens, by_steps = load([f"model={preset}", "tokens=1e9"]), load([f"model={preset}", "steps=7"])
        assert validate(by_tokens, 1).steps == 10**9 // (by_tokens.global_batch_size * by_tokens.sequence_length)
        assert (validate(by_steps, 1).steps, by_tokens.steps, by_steps.tokens) == (7, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "x*sigmoid(1.702*x)",
        "where(x > 0, x, 0.25*x)",
        "max(x, 0)",
        "(x)",
        "a b",
        "it's",
        'say "x"',
        "a=b",
        "a,b",
        "{a}",
        "{a: 1}",
        "x#y",
        "*.txt",
        "~/x/../y",
        "1",
        "null ",
        "true",
        "été/漢字",
        "back\\slash",
        "ends\\",
        "odd\\'quote",
        "two\\\\",
    ],
)
def test_formulas_and_paths_are_taken_as_typed(text):
    assert load(["data=text", f"data.path={text}"]).data.path == text
    assert load(["ffn=custom", f"ffn.formula={text}"]).ffn.formula == text
    inside = load(["data=blend", f"data.parts.a.path={text}", f"data.parts.a.field={text}", "data.parts.a.weight=0.5"])
    assert inside.data.parts == {"a": {"path": text, "field": text, "weight": 0.5}}
    assert load([f"ffn.per_layer.last.formula={text}"]).ffn.per_layer == {"last": {"formula": text}}


@pytest.mark.parametrize("key", ["data.field", "data.split", "data.subset", "logger.project", "logger.group"])
def test_every_text_of_the_schema_is_taken_as_typed(key):
    group, name = key.split(".")
    for text in ("007", "1.50", "1e5", "a, b", "it's", "{a: 1}"):
        assert getattr(getattr(load([f"++{key}={text}"]), group), name) == text


def test_quotes_that_are_typed_and_lists_are_read():
    assert load(["data=text", "data.path='a b'"]).data.path == "a b"
    assert load(["data=text", 'data.path="a b"']).data.path == "a b"
    assert load(["data=text", "data.path=[a,'b c']"]).data.path == ["a", "b c"]
    assert load(["data.path=null"]).data.path is None


def test_a_value_too_long_to_parse_is_refused():
    assert "1,000,000 characters" in refusal("ffn.formula=" + "x" * 10**6)


def test_an_interpolation_of_nothing_is_one_sentence():
    found = refusal("data.path=${nothing}")
    assert "'nothing' not found" in found
    assert "\n" not in found


def test_the_parts_of_a_blend_are_the_users_own():
    config = load(["data=blend", "data.parts.code.path=src/", "data.parts.code.weight=0.3", "data.parts.web.path=w"])
    assert config.data.parts == {"code": {"path": "src/", "weight": 0.3}, "web": {"path": "w"}}
    validate(config, 1)


def test_awkward_values_read_back_equal(tmp_path):
    words = ["prompts=['a: b','# c','d\\n','null']", "model.n_kv_heads=2", "optim.lr=1e-9", "run=yes"]
    words += ["data=text", "data.path='1'"]
    config = load(words)
    assert config.prompts == ["a: b", "# c", "d\\n", "null"]
    assert read_back(config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "text", ["steps: many\n", "stepz: 1\n", "a: [", "- 1\n- 2\n", "just words\n", "model: 3\n", "\x00", "a: b: c"]
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        from_yaml(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        from_yaml(tmp_path / "missing.yaml")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="does not fit the configuration schema"):
        from_yaml(path)


def test_a_run_is_found_by_name_and_by_path(tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with pytest.raises(UserError, match="nor any other with a checkpoint"):
        find_run("first", str(tmp_path / "runs"))
    (run / "config.yaml").write_text("{}")
    assert find_run("first", str(tmp_path / "runs")) == run
    assert find_run(str(run), "elsewhere") == run
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "runs" / "failed").mkdir()
    (tmp_path / "runs" / "failed" / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"choose from first$"):
        find_run("frist", str(tmp_path / "runs"))


def test_the_keys_are_complete_and_unique():
    names = [name for name, _, _ in keys()]
    assert len(set(names)) == len(names)
    assert set(names) == set(flatten(to_dict(load([]))))


def test_a_group_beside_the_configuration_is_read_with_what_was_typed():
    words = ["cluster=h100", "ffn=relu", "cluster.time=1:30:00", "cluster.hardware.watts=500", "cluster.modules=[cuda]"]
    cluster, others = read_group("cluster", ClusterConfig, words, "cluster")
    assert others == ["ffn=relu"]
    assert (cluster.name, cluster.time, cluster.modules) == ("h100", "1:30:00", ["cuda"])
    assert (cluster.hardware.watts, cluster.hardware.bf16_flops) == (500.0, 989.4e12)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "cluster=NAME is missing: choose a cluster from a100, cpu, h100, h200, slurm"),
        (["cluster=h10"], "unknown cluster 'h10': did you mean 'h100'"),
        (["cluster=cpu", "cluster.tiem=1"], "unknown key of cluster 'tiem': did you mean 'time'"),
        (
            ["cluster=cpu", "cluster.gpus_per_node=many"],
            "cluster cpu: Value 'many' of type 'str' could not be converted",
        ),
    ],
)
def test_a_mistyped_group_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        read_group("cluster", ClusterConfig, words, "cluster")


def test_a_secret_in_a_list_of_urls_is_refused_where_values_are_checked():
    config = load(["data=text", "data.path=x"])
    config.data.path = ["a", "https://me:hunter2@a.org/t"]
    with pytest.raises(UserError, match="write \\$NAME") as error:
        validate(config, 1)
    assert "hunter2" not in str(error.value)


def test_a_layer_may_be_typed_as_a_number(tmp_path):
    config = load(["ffn.per_layer={0: relu2, last: {parameters: {a: {1: 2}}}}"])
    assert config.ffn.per_layer == {"0": "relu2", "last": {"parameters": {"a": {"1": 2}}}}
    assert read_back(config, tmp_path / "config.yaml") == config
    (tmp_path / "old.yaml").write_text(to_yaml(config).replace("'0':", "0:"), encoding="utf-8")
    assert from_yaml(tmp_path / "old.yaml") == config
    assert values_of(tmp_path / "old.yaml")["ffn.per_layer.0"] == "relu2"
    assert load(["ffn.per_layer={0: relu2}"]).run != load(["ffn.per_layer={1: relu2}"]).run
    assert load(["data=blend", "data.parts={0: {source: text, path: x}}"]).data.parts == {
        "0": {"source": "text", "path": "x"}
    }


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ffn=SwiGLU", "unknown ffn 'SwiGLU': did you mean 'swiglu'?"),
        ("ffn=x*atan(x)", "'x*atan(x)' is a formula, not the name of an arm: write ffn=custom ffn.formula='x*atan(x)'"),
        ("ffn=x", "'x' is a formula, not the name of an arm"),
        (
            "ffn.per_layer={0: gate*up}",
            "'gate*up' is a formula, not the name of an arm: write ffn.per_layer.0.formula=",
        ),
        ("data.path=https://me:abc@a.org/t", "data.path has a URL with a password or token before the host"),
        ("data.path=[a,'https://a.org/t?X-Goog-Signature=abc']", "with the secret parameter X-Goog-Signature"),
        ("data.parts.a.path=s3://key:abc@bucket/text", "data.parts.a.path has a URL with a password"),
        ("tokenizer.path=https://a.org/t.json", "is not on this machine, and only a local tokenizer is read"),
        ("runs=s3://bucket/runs", "runs=s3://bucket/runs is not on this machine, and files are only written to"),
        (
            "tokenizer=meta-llama/Llama-2-7b",
            "a tokenizer in a file is tokenizer=huggingface tokenizer.path=tokenizer.json",
        ),
        ("model=meta-llama/Llama-2-7b", "is imported by python -m model.import_hf from=FOLDER"),
        (
            "data=notes/",
            "data=notes/ names no choice of blend, hf, installed, jsonl, parquet, stdlib, text: text in files is data=text",
        ),
        ("hydra/launcher=submitit_slurm", "its run folders, sweepers and launchers are not used; --multirun sweeps"),
    ],
)
def test_the_last_hint_is_given(word, sentence):
    assert sentence in refusal(word)


def test_every_count_may_be_typed_in_thousands():
    counts = [name for name, kind, _ in keys() if kind in (int, typing.Optional[int]) and name != "steps"]
    values = flatten(to_dict(load([f"++{name}=1.5K" for name in counts])))
    assert {values[name] for name in counts} == {1500}
