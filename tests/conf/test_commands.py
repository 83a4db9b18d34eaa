"""The commands as a user meets them: bad input is status 2 and a sentence on standard error, good input needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.common.commands import run_command
from kernels.common.errors import UserError, suggest, unknown

ROOT = Path(__file__).parents[2]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=300
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ffn=swigluu"], "error: unknown ffn 'swigluu': did you mean 'swiglu'? choose from bilinear, custom, "),
        (["--local_rank=1", "ffn=swiglu"], "error: --local_rank=1 was given, but no launcher set RANK and WORLD_SIZE"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(words, sentence):
    ended = run("train.py", *words)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(sentence)
    assert len(ended.stderr.splitlines()) == 1


def test_only_rank_0_says_it():
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    ended = run("train.py", "ffn=swigluu", RANK="1", **launched)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "module", ["conf.load", "conf.validate", "kernels.formula", "kernels", "launch.estimate.counts", "launch.ranks"]
)
def test_what_needs_no_torch_does_not_load_it(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'deepspeed', 'sympy') if name in sys.modules])"
    ended = run("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def status_of(main: Callable[[list[str]], int | None], capsys, monkeypatch) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["command", "word"])
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


def test_the_status_of_a_command(capsys, monkeypatch):
    def refuse(argv: list[str]) -> None:
        raise UserError(f"{argv} is wrong")

    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    assert status_of(lambda _: None, capsys, monkeypatch) == (0, "")
    assert status_of(lambda _: 3, capsys, monkeypatch) == (3, "")
    assert status_of(refuse, capsys, monkeypatch) == (2, "error: ['word'] is wrong\n")
    assert status_of(interrupt, capsys, monkeypatch) == (130, "interrupted\n")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def bug(_: list[str]) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(KeyError, match="ours"):
        run_command(bug)


def test_a_closed_pipe_is_no_error():
    code = "from kernels.common.commands import run_command; run_command(lambda _: print('x' * 10**6))"
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait(timeout=300) == 0


def test_suggestions_are_near_misses_only():
    assert suggest("swigluu", ["relu", "swiglu"]) == "did you mean 'swiglu'? "
    assert suggest("zzz", ["relu", "swiglu"]) == ""
    assert str(unknown("arm", "b", ["d", "c"])) == "unknown arm 'b': choose from c, d"
