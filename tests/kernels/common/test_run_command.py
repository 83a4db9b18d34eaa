"""The frame of a command: its exit status, its errors and its usage; and the names that errors suggest."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.common.commands import run_command
from kernels.common.errors import UserError, suggest, unknown

ROOT = Path(__file__).parents[3]


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


def lines_of_ranks(tmp_path: Path, *sentences: str) -> list[str]:
    """Return what ranks of one launcher print on standard error, each of which fails with its sentence."""
    code = """if True:
        import os
        from kernels.common.commands import run_command
        from kernels.common.errors import UserError

        def main(_):
            raise UserError(os.environ["SENTENCE"])

        run_command(main)"""
    ranks = []
    for rank, sentence in enumerate(sentences):
        launched = {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(sentences)), "SENTENCE": sentence}
        environment = os.environ | launched | {"TMPDIR": str(tmp_path), "MASTER_PORT": "1"}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    printed = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2] * len(ranks)
    return sorted("".join(printed).splitlines())


def test_ranks_that_share_an_error_print_it_once_and_others_print_their_own(tmp_path):
    for _ in range(2):  # the same command again prints it again
        [line] = lines_of_ranks(tmp_path, "it is wrong", "it is wrong")
        assert line.removeprefix("error: ").removeprefix("rank 1: ") == "it is wrong"
    assert lines_of_ranks(tmp_path, "a", "b") == ["error: a", "error: rank 1: b"]


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def bug(_: list[str]) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(KeyError, match="ours"):
        run_command(bug)


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), 75, "error: a/b: the disk is full; free some space\n"),
        (OSError(errno.EROFS, "x", "a/b"), 1, "error: a/b: the file system is read-only; make it writable\n"),
    ],
)
def test_an_error_of_the_disk_is_a_sentence(error, status, sentence, capsys, monkeypatch):
    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.delenv("RANK", raising=False)
    assert status_of(fail, capsys, monkeypatch) == (status, sentence)


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
    assert suggest("SwiGLU", ["relu", "swiglu"]) == "did you mean 'swiglu'? "
    assert suggest("zzz", ["relu", "swiglu"]) == ""
    assert str(unknown("arm", "b", ["d", "c"])) == "unknown arm 'b': choose from c, d"


@pytest.mark.parametrize(
    ("arguments", "printed"), [(["-h"], "usage\n"), (["a=1", "--help"], "usage\n"), ([], "usage\n"), (["a=1"], "ran\n")]
)
@pytest.mark.parametrize("usage", ["\nusage\n", lambda: "usage"])
def test_help_prints_the_usage_and_runs_nothing(arguments, printed, usage, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda _: print("ran"), usage, needs_arguments=True)
    assert stopped.value.code == 0
    assert capsys.readouterr().out == printed


def test_without_a_usage_the_command_answers_help_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        run_command(print)
    assert capsys.readouterr().out == "['--help']\n"
