"""House rules that a linter does not have: the field's words, functions that fit on a screen, and files of bounded length."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
if not TRACKED:
    pytest.skip("not a clone of the repository: git lists no files", allow_module_level=True)
PYTHON = [name for name in TRACKED if name.endswith(".py")]
PROSE = [
    name
    for name in TRACKED
    if name.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".c", ".h", ".jinja"))
    and not name.startswith(("tests/compatibility/v0_1/", "bench/results/"))
    and name not in ("CHANGELOG.md", "tests/test_style.py")
]
# "tokens a second" for tokens per second, and the like.
_AMOUNT = (
    "bits|bytes|dollars|elements|flops|gib|instructions|mib|nats|operations|parameters|seconds|sequences|steps|tokens"
)
_PER = "byte|channel|core|day|element|gpu|hour|layer|minute|node|parameter|process|rank|run|second|sequence|step|token"
OLD_WORDS = {
    "per": rf"\b({_AMOUNT}) an? ({_PER})\b(?! time)",
    "sharding": r"\b(cut_parameter|cut_of|whole_shape|_whole_model)\b|\bjoin\(tensor",
    "ranks that talk": r"\bwhat (they|ranks) say\b|[Ww]ords between\b|\bspoken\b",
    "plans": r"\bclass (Cell|Cells)\b|\bCell\(",
    "loggers": r"\b(Mirrors|_Behind)\b",
    "telemetry": r"\bclass Seen\b|\bSeen\(|[Ll]ooks? into the layers",
    "sessions": r"\bsittings?\b",
}


@pytest.mark.parametrize("rule", OLD_WORDS)
def test_no_word_of_the_old_vocabulary_is_left(rule):
    found = []
    for name in PROSE:
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(OLD_WORDS[rule], text, re.I if rule == "per" else 0):
            found.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    assert not found, "\n".join(found)


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def statements_of(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement, inner ones too; expressions, most of a tree, hold none."""
    for statement in body:
        yield statement
        for _, value in ast.iter_fields(statement):
            if isinstance(value, list) and value and not isinstance(value[0], ast.expr):
                for inner in value:
                    yield from statements_of([inner] if isinstance(inner, ast.stmt) else getattr(inner, "body", []))


def test_functions_fit_on_a_screen():
    long = []
    for name in PYTHON:
        for node in statements_of(parsed(name).body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_files_are_short_enough_to_read_at_once():
    lengths = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in PYTHON}
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}


def test_no_two_classes_of_the_rooms_have_one_name():
    places: dict[str, list[str]] = {}
    for name in PYTHON:
        # modeling.py is copied into exported folders, where it stands alone.
        if not name.startswith(("tests/", "examples/")) and name != "model/huggingface/modeling.py":
            for node in parsed(name).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these, and refuses the second of a name only where both are run."""
    names = [Path(name).name for name in PYTHON if Path(name).name.startswith("test_")]
    assert {name for name in names if names.count(name) > 1} == set()
