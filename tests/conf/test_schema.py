"""No dead keys: each key of the schema is read by the code that it is for, and stands in --help with its meaning."""

from __future__ import annotations

import ast
import typing
from pathlib import Path

import pytest

from conf.keys import choices, keys
from conf.load import load
from conf.schema import GROUPS, Config

ROOT = Path(__file__).parents[2]
ROOMS = ("ablation", "bench", "conf", "data", "kernels", "launch", "model", "training")
GROUP_OF_CLASS = {kind.__name__: name for name, kind in typing.get_type_hints(Config).items() if name in GROUPS}
# They say in config.yaml which choice was taken: for the reader of a run, not for the code.
LABELS = {"tokenizer.name", "logger.name"}


def keys_read_in(source: str) -> set[str]:
    """Return the dotted keys that code reads: `config.seed`, `config.optim.lr`, `optim.lr`, or `x.lr` with x: OptimConfig."""
    found = set()
    for scope in ast.walk(ast.parse(source)):
        if not isinstance(scope, (ast.Module, ast.FunctionDef)):
            continue
        owners = {"config": ""} | {group: f"{group}." for group in GROUPS}  # a name in the code: the keys' prefix
        for argument in scope.args.args if isinstance(scope, ast.FunctionDef) else []:
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if kind in GROUP_OF_CLASS:
                owners[argument.arg] = f"{GROUP_OF_CLASS[kind]}."
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in owners:
                    found.add(owners[owner] + node.attr)
    return found


@pytest.fixture(scope="module")
def read_keys() -> set[str]:
    files = [ROOT / "train.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    files.remove(ROOT / "conf" / "schema.py")
    return set().union(*(keys_read_in(path.read_text(encoding="utf-8")) for path in files))


@pytest.mark.parametrize("name", [name for name, _, _ in keys() if name not in LABELS])
def test_every_key_is_read_by_some_code(name, read_keys):
    assert name in read_keys


def test_the_search_for_dead_keys_tells_a_read_from_what_looks_like_one():
    assert keys_read_in("def f(self): return self.config.optim.lr + config.seed") >= {"optim.lr", "seed"}
    assert "model.d_ff" in keys_read_in("def f(shape: ModelConfig): return shape.d_ff")
    assert "optim.lr" not in keys_read_in("config.optim.lr = 1; path.lr; 'optim.lr'; lr = 3")


@pytest.fixture
def help_lines(capsys, monkeypatch) -> list[str]:
    """Of a terminal that is wide enough for every key on a line of its own."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        load(["ffn=swiglu", "--help"])
    assert stopped.value.code == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_help_lists_every_key_with_its_meaning(help_lines):
    for name, _, field in keys():
        (line,) = (line for line in help_lines if line.startswith(f"{name}="))
        assert line.endswith(" " + field.metadata["help"])
        assert field.metadata["help"]


def test_help_lists_every_group_with_its_choices(help_lines):
    listed = {line.split()[0]: line.split()[1::2] for line in help_lines if line.count(" | ") or "= " in line}
    default = {"ffn": "swiglu", "model": "nano", "data": "stdlib", "schedule": "linear", "zero": "1", "logger": "wandb"}
    for group in GROUPS:
        assert [choice.removesuffix("*") for choice in listed[f"{group}="]] == choices(group)
        [starred] = [choice.removesuffix("*") for choice in listed[f"{group}="] if choice.endswith("*")]
        assert starred == default.get(group, starred)


def test_help_shows_the_values_of_the_default_run(help_lines):
    shown = {line.split()[0] for line in help_lines if line}
    assert {"optim.lr=0.004", "sequence_length=256", "model.d_model=192", "tokens=5800000"} <= shown


def test_cfg_prints_the_composed_configuration_and_runs_nothing(capsys):
    with pytest.raises(SystemExit) as stopped:
        load(["--cfg", "ffn=relu", "seed=3"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "formula: relu(x)\n" in printed
    assert "\nseed: 3\n" in printed
    assert {line.split(":")[0].strip() for line in printed.splitlines() if ":" in line} >= {
        name.rpartition(".")[2] for name, _, _ in keys()
    }
