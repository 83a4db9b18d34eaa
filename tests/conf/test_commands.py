"""The commands as a user meets them: bad input is status 2 and a sentence on standard error, good input needs no torch."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Started by others: torchrun, a job, a campaign. The last is an alias of model.import_hf.
NOT_TYPED = ("launch.collective", "launch.torchrun", "bench.faults.blocked_train", "model.load")
ROOMS = ("ablation", "bench", "data", "kernels", "launch", "model")


def commands() -> list[str]:
    """Return the modules that `python -m` runs: those with a main block; a package has one in its __main__.py."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    runnable = [path for path in paths if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in runnable]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=300
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ffn=swigluu"], "error: unknown ffn 'swigluu': did you mean 'swiglu'? choose from bilinear, custom, "),
        (["--steps=10"], "error: unknown option '--steps=10': write steps=10 (python train.py --help lists them)"),
        (["--micro-batch-size", "4"], "error: unknown option '--micro-batch-size': write micro_batch_size=VALUE ("),
        (["--bogus"], "error: unknown option '--bogus': write GROUP=CHOICE or KEY=VALUE ("),
        (["--local_rank=1", "ffn=swiglu"], "error: --local_rank=1 was given, but no launcher set RANK and WORLD_SIZE"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(words, sentence):
    ended = run("train.py", *words)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(sentence)
    assert len(ended.stderr.splitlines()) == 1


def test_an_error_of_one_rank_is_printed_with_its_number():
    ended = run("train.py", RANK="1", WORLD_SIZE="1", LOCAL_RANK="0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: rank 1: RANK=1 does not fit WORLD_SIZE=1\n"


@pytest.mark.parametrize(
    "module", ["conf.load", "conf.validate", "kernels.formula", "kernels", "launch.estimate.counts", "launch.ranks"]
)
def test_what_needs_no_torch_does_not_load_it(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'deepspeed', 'sympy') if name in sys.modules])"
    ended = run("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


@pytest.mark.parametrize("module", [name for name in commands() if name not in NOT_TYPED])
def test_every_command_answers_help(module, capsys, monkeypatch):
    """It names the command and every option of its own, and fits a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run_here(monkeypatch, module, "--help") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert module in printed.out
    assert len(lines) >= 3
    assert [line for line in lines if len(line) > 80] == []
    assert [
        name for name in own_options(monkeypatch, module) if not re.search(rf"(^|[ -]){name}\b", printed.out, re.M)
    ] == []


class _OptionsRead(Exception):
    """Raised where a command reads its options."""


def run_here(monkeypatch: pytest.MonkeyPatch, module: str, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", [module, *words])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def own_options(monkeypatch: pytest.MonkeyPatch, module: str) -> list[str]:
    """Return the options that a command reads by `kernels.common.options`; none where it reads them otherwise."""
    options: list[str] = []

    def record(_: object, defaults: dict[str, object], *__: object, **___: object) -> None:
        options.extend(defaults)
        raise _OptionsRead

    for reader in ("read_options", "read_positional", "split_options"):
        monkeypatch.setattr(f"kernels.common.options.{reader}", record)
    with contextlib.suppress(_OptionsRead):
        run_here(monkeypatch, module, "no-such-argument")
    return options


def test_the_search_for_commands_and_options_finds_them(monkeypatch):
    assert own_options(monkeypatch, "data.prepare") == ["part", "jobs"]
    assert {"ablation.run", "data.prepare", "launch.estimate", "model.generate", "kernels.show"} <= set(commands())


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        ("launch.estimate", ["cluster=cpu", "node=2"], "unknown key 'node': did you mean 'nodes'? "),
        ("launch.slurm", ["cluster=slurm", "dryrun=true"], "unknown key 'dryrun': did you mean 'dry_run'? "),
        ("launch.doctor", ["quik=true"], "unknown key 'quik': did you mean 'quick'? "),
        ("ablation.run", ["ablation=smoke", "job=2"], "unknown key 'job': did you mean 'jobs'? "),
        ("ablation.run", ["ablation=smoke", "fnn=relu"], "unknown key 'fnn': did you mean 'ffn'? "),
        ("data.prepare", ["prt=0/4"], "unknown key 'prt': did you mean 'part'? "),
        ("bench.verdicts", ["plan=1"], "unknown option 'plan': did you mean 'plans'? "),
        ("bench.overhead", ["step=1"], "unknown key 'step': did you mean 'steps'? "),
        ("model.generate", ["nano"], "unexpected 'nano': write NAME=VALUE, with one of prompt, run, "),
    ],
)
def test_a_mistyped_option_of_the_command_is_told_from_the_keys_of_a_run(module, words, sentence, capsys, monkeypatch):
    assert run_here(monkeypatch, module, *words) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
