"""Check a shown command without running it: compose its configuration, and validate it for the ranks that it asks for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

from conf.load import keys, load
from conf.schema import GROUPS
from conf.validate import validate
from launch.multirun import FLAGS, expand
from tests.docs.pages import ROOT

_RANKS = re.compile(r"--(?:num_gpus|nproc[-_]per[-_]node|ntasks-per-node)[= ](\d+)")
_NODES = re.compile(r"--(?:nnodes|num_nodes|nodes)[= ](\d+)")
_PLAIN = ("git", "pip", "source", "sbatch")  # of `parse`: programs that need a network, a cluster or a person's shell


def compose(command: str) -> None:
    """Raise if the command could not begin: an unknown module, target, key or choice, or values that do not fit together."""
    _compose(tuple(shlex.split(command, comments=True)))


@functools.cache
def _compose(typed: tuple[str, ...]) -> None:
    arguments = list(typed)
    while "=" in arguments[0]:  # variables for the command
        arguments.pop(0)
    if arguments[0] == "make":
        _make(arguments[1:])
    elif "train.py" in arguments:
        launcher, overrides = _split(arguments, "train.py")
        _train(" ".join(launcher), overrides)
    elif arguments[:2] == ["python", "-m"]:
        _module(arguments[2], arguments[3:])
    else:
        raise AssertionError(f"{arguments[0]} is not composed: only train.py under a launcher, python -m, and make are")


def parse(command: str) -> None:
    """Raise if the shell cannot parse the command, or if it could be run or composed."""
    subprocess.run(["bash", "-n", "-c", command], check=True)
    for part in re.split(r"&&|\|\||;|\|", command):
        program = shlex.split(part, comments=True)[0]
        assert program in (*_PLAIN, "cd"), f"{program} needs no network and no cluster: it can be run or composed"


class _Refusing(io.StringIO):
    """A terminal at which somebody types no."""

    def isatty(self) -> bool:
        return True


def _split(arguments: list[str], at: str) -> tuple[list[str], list[str]]:
    index = arguments.index(at)
    return arguments[:index], arguments[index + 1 :]


def _make(targets: list[str]) -> None:
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True, timeout=60)


def _train(launcher: str, overrides: list[str]) -> None:
    ranks, nodes = _RANKS.search(launcher), _NODES.search(launcher)
    world_size = int(ranks[1] if ranks else 1) * int(nodes[1] if nodes else 1)
    swept = [override for override in overrides if override not in FLAGS]
    for run in expand(swept) if swept != overrides else [swept]:
        validate(load(run), world_size)


def _module(name: str, arguments: list[str]) -> None:
    if name == "launch.slurm":
        arguments = [*arguments, "dry_run=true"]
    if name in ("launch.slurm", "launch.estimate", "ablation.run"):
        module = importlib.import_module(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)
        console = io.StringIO()
        with mock.patch.object(sys, "stdin", _Refusing("no\n")), contextlib.redirect_stdout(console):
            assert not module.main(arguments)  # a plan prints its cost, the answer is no, and nothing runs
        assert console.getvalue()
        return
    path = file_of(name)
    assert path is not None, f"there is no module {name}"
    documented = path.read_text(encoding="utf-8").split('"""')[1]
    configuration = {dotted for dotted, *_ in keys()} | set(GROUPS)
    for argument in arguments:
        option = argument.lstrip("-").partition("=")[0]
        if "=" in argument or argument.startswith("-"):
            known = option in configuration or re.search(rf"(?<![\w.]){re.escape(option)}(?![\w.])", documented)
            assert known, f"{name} does not document {argument!r}"


def file_of(module: str) -> Path | None:
    """Return the file that `python -m module` runs."""
    path = ROOT.joinpath(*module.replace("formula_ffn", "kernels").split("."))
    candidates = [path.with_suffix(".py"), path / "__main__.py"]
    return next((candidate for candidate in candidates if candidate.is_file()), None)
