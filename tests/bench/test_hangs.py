"""The campaign of hangs in short: of two ranks one is stopped, or blocks in its save, and the watchdog ends both."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from bench.faults.hangs import Hang, HangOutcome, cases, verdict
from launch.endings import read_ending
from tests.training import warm
from tests.training.tiny import PATIENCE, ROOT, environment, free_port, overrides, shared_corpus

BOUNDS = {"watchdog__minutes": 0.1, "watchdog__phase_minutes": 0.25}


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """A function that starts two ranks of an endless run, with the variable BLOCKED."""
    corpus, started = shared_corpus(tmp_path_factory), []

    def run(blocked: str = "") -> list[warm.Process]:
        words = overrides(corpus, tmp_path, run="run", steps=5000, eval_every=0, telemetry_every=0, **BOUNDS)
        port = str(free_port())
        for rank in ("0", "1"):
            ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
            variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, BLOCKED=blocked or "none 0 0 .", **ranks)
            command = [warm.sys.executable, str(ROOT / "bench" / "faults" / "blocked_train.py"), *words]
            started.append(warm.Process(command, variables, ROOT))
        return started

    yield run
    for process in started:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()
        process.stderr.close()


def ended(ranks: list[warm.Process], run: Path, culprit: int) -> str:
    """Check how a run ended; return what rank 0 printed on standard error."""
    printed = [rank.communicate(PATIENCE)[1].decode() for rank in ranks]
    ending = read_ending(run)
    assert ending is not None, printed
    assert (ending.status, ending.exit_status, ending.rank) == ("hung", 4, culprit)
    assert printed[0].splitlines()[-1].startswith(f"error: the run hangs: waiting for rank {culprit} since ")
    assert "error" not in printed[1]
    return printed[0]


def test_a_stopped_rank(start, tmp_path):
    ranks, seen = start(), b""
    while not re.search(rb"step +3/", seen):
        seen += (part := ranks[0].stdout.read(1 << 16))
        assert part, ranks[0].stderr.read()
    ranks[1].send_signal(signal.SIGSTOP)
    printed = ended(ranks, tmp_path / "run", culprit=1)
    assert "writes no heartbeat any more; it was " in printed
    assert [rank.returncode for rank in ranks] == [4, 4]  # it was let go on
    assert "rank 0, thread MainThread" in (tmp_path / "run" / "stacks" / "rank_0.txt").read_text()


def test_a_rank_whose_save_blocks(start, tmp_path):
    ranks = start(f"save 1 4 {tmp_path}")
    printed = ended(ranks, tmp_path / "run", culprit=1)
    assert "it is saving the checkpoint of step 4 (bench/faults/blocked_train.py:" in printed
    assert [rank.returncode for rank in ranks] == [4, 4]
    for rank in range(2):
        assert "in first_failure" in printed or rank  # where the saver of rank 0 waits
        assert (tmp_path / "run" / "stacks" / f"rank_{rank}.txt").exists()


def test_the_campaign_covers_each_place_before_the_first_step_and_later():
    covered = {(case.place, case.step, case.ranks, case.launcher) for case in cases(0)}
    assert len(covered) == len(cases(0)) == 28
    assert {case.rank for case in cases(0)} == {0, 1, 2, 3}


def test_a_verdict_says_what_is_wrong():
    case = Hang("stop", 4, 4, 2, "torchrun")
    assert verdict(case, HangOutcome(1, 30.0, 3, 2, 0, "")) == ""
    assert verdict(case, HangOutcome(None, 72.0, 3, 2, 0, "")) == "it had not ended 72 s after it hung"
    assert verdict(case, HangOutcome(0, 30.0, 3, 2, 0, "")) == "its status is 0"
    assert verdict(case, HangOutcome(1, 73.0, 3, 2, 0, "")) == "it ended only after 73 s"
    assert verdict(case, HangOutcome(1, 30.0, 3, 2, 1, "")) == "1 processes stayed behind"
    assert verdict(case, HangOutcome(1, 30.0, 3, 1, 0, "why")) == "it names rank 1: why"
    assert verdict(case, HangOutcome(1, 30.0, 2, 2, 0, "")) == "it left 2 stacks of 3"
