"""A rank that fails first prints its traceback, every rank one sentence, and the run folder says how the session ended."""

from __future__ import annotations

import errno
import sys

import pytest

from kernels.common.errors import Diverged, UserError
from launch.endings import SessionEnding, claim_ending, read_ending, write_ending
from launch.ranks import Ranks
from tests.training import warm
from tests.training.tiny import PATIENCE, ROOT, environment, free_port, overrides, shared_corpus
from training import failure
from training.failure import explain, is_lost_peer

TWO = Ranks(1, 2, 1, 2)
LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:25316")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_first_rank_prints_its_traceback_and_another_one_a_sentence(tmp_path, capsys):
    reason = explain(raised(KeyError("key")), TWO, tmp_path, 7)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback ")
    assert printed.endswith("KeyError: 'key'\n")
    assert str(reason).startswith("failed after step 7: KeyError: 'key' (")
    assert reason.status == 1
    ending = read_ending(tmp_path)
    assert (ending.status, ending.exit_status, ending.rank, ending.step) == ("failed", 1, 1, 7)
    assert ending.reason == str(reason)
    other = explain(raised(ValueError("also")), Ranks(0, 2, 0, 2), tmp_path, 7)
    assert capsys.readouterr().err == ""
    assert str(other).startswith("failed after step 7: ValueError: also (")
    assert read_ending(tmp_path) == ending


def test_a_rank_that_lost_another_says_that_it_has_left(tmp_path, capsys):
    claim_ending(tmp_path, SessionEnding("failed", 1, "why", 0, 7))
    reason = explain(raised(LOST), TWO, tmp_path, 7)
    assert (str(reason), reason.status) == ("rank 0 has left", 1)
    assert capsys.readouterr().err == ""


def test_a_rank_that_was_killed_left_no_word(tmp_path, monkeypatch):
    monkeypatch.setattr(failure, "_WAIT_SECONDS", 0.0)
    reason = explain(raised(LOST), TWO, tmp_path, 7)
    assert str(reason).startswith("another rank was killed, or its node is lost (RuntimeError: [/gloo/")
    assert reason.status == 75
    assert (read_ending(tmp_path).status, read_ending(tmp_path).exit_status) == ("lost", 75)


@pytest.mark.parametrize(
    ("error", "status", "exit_status"), [(Diverged("nan"), "diverged", 3), (UserError("no memory"), "refused", 2)]
)
def test_a_failure_that_has_a_sentence_keeps_it(tmp_path, error, status, exit_status):
    assert explain(error, TWO, tmp_path, 7) is error
    assert read_ending(tmp_path) == SessionEnding(status, exit_status, str(error), 1, 7, read_ending(tmp_path).time)


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (OSError(errno.ENOSPC, "x"), "{run}: the disk is full; free some space and run the same command again", 75),
        (
            OSError(errno.EIO, "x", "a/b"),
            "a/b: the disk reports an error; check the disk (dmesg has its errors) and run",
            75,
        ),
        (OSError(errno.EROFS, "x", "a/b"), "a/b: the file system is read-only; name another folder", 2),
    ],
)
def test_an_error_of_the_disk_is_a_sentence_and_no_traceback(tmp_path, capsys, error, sentence, status):
    reason = explain(raised(error), TWO, tmp_path, 7)
    assert str(reason).startswith(f"cannot read or write {sentence.format(run=tmp_path)}")
    assert reason.status == read_ending(tmp_path).exit_status == status
    assert capsys.readouterr().err == ""


def test_a_refusal_before_the_first_step_leaves_the_folder_as_it_is(tmp_path):
    error = UserError("another process is training")
    assert explain(error, TWO, tmp_path, trained=False) is error
    assert list(tmp_path.iterdir()) == []


def test_a_jobs_script_learns_of_a_refusal_before_the_first_step(tmp_path, monkeypatch):
    error = raised(UserError("a file is in the way"))
    (tmp_path / "slurm").mkdir()
    explain(error, TWO, tmp_path, trained=False)  # typed by hand, beside a job's folder
    assert read_ending(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    explain(error, TWO, tmp_path, trained=False)
    assert read_ending(tmp_path).exit_status == 2


def test_the_ending_of_an_earlier_session_does_not_count(tmp_path, capsys):
    write_ending(tmp_path, SessionEnding("hung", 4, "before", 0, 3))
    later = (tmp_path / "ending.json").stat().st_mtime + 60
    assert read_ending(tmp_path, later) is None
    explain(raised(KeyError("key")), TWO, tmp_path, 7, since=later)
    assert capsys.readouterr().err.startswith("Traceback ")
    assert read_ending(tmp_path).status == "failed"


def test_an_interrupt_is_not_explained(tmp_path):
    interrupt = KeyboardInterrupt()
    assert explain(interrupt, TWO, tmp_path, 7) is interrupt


def test_an_error_of_the_program_is_no_lost_rank():
    assert is_lost_peer(ConnectionResetError("[Errno 104] Connection reset by peer"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(KeyError("Connection closed by peer"))


def test_an_ending_is_read_as_it_was_written(tmp_path):
    assert read_ending(tmp_path) is None
    write_ending(tmp_path, SessionEnding("stopped", 0, step=3))
    assert read_ending(tmp_path).step == 3
    (tmp_path / "ending.json").write_text('{"status": ')
    assert read_ending(tmp_path) is None


FAILS = """
import sys
sys.path.insert(0, {root!r})
import os, train
from data.batches import BatchStream
from kernels.common.commands import run_command
from launch.ranks import leave_after

samples = BatchStream.samples
def fail(self, first, count):
    if first >= 3 * 8 and os.environ["RANK"] == "1":
        raise KeyError("a bug")
    return samples(self, first, count)
BatchStream.samples = fail
leave_after(lambda: run_command(train.main))
"""


def test_two_ranks_of_which_one_fails(tmp_path, tmp_path_factory):
    script, port = tmp_path / "fails.py", str(free_port())
    script.write_text(FAILS.format(root=str(ROOT)))
    words = overrides(shared_corpus(tmp_path_factory), tmp_path, run="run", eval_every=0)
    started = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ranks)
        started.append(warm.Process([sys.executable, str(script), *words], variables, ROOT))
    printed = [process.communicate(PATIENCE)[1].decode().splitlines() for process in started]
    assert [process.returncode for process in started] == [1, 1], printed
    assert [line for line in printed[1] if line.startswith("Traceback")] == ["Traceback (most recent call last):"]
    assert printed[1][-1].startswith("error: rank 1: failed after step 3: KeyError: 'a bug' (")
    assert [line for line in printed[0] if "Traceback" in line] == []
    assert [line for line in printed[0] if line.startswith("error")] == ["error: rank 1 has left"]
    assert printed[0][-1] == "error: rank 1 has left"
    assert read_ending(tmp_path / "run").rank == 1


def test_a_run_says_how_it_ended(no_group, corpus, tmp_path):
    words = overrides(corpus, tmp_path, run="run", steps=2, eval_every=0)
    assert no_group.run("command", module="train", arguments=words)[0]["status"] == 0
    ending = read_ending(tmp_path / "run")
    assert (ending.status, ending.exit_status, ending.reason, ending.step) == ("finished", 0, "", 2)
    assert not (tmp_path / "run" / "heartbeats").exists()
