"""The watchdog: when a rank counts as hanging, what it writes, and what it does about it; with a clock of the test's own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest

from conf.load import load
from conf.schema import WatchdogConfig
from kernels.common.errors import UserError
from launch import heartbeats, stacks
from launch.endings import read_ending
from launch.heartbeats import Activity, Diagnosis, Heartbeat, start_of
from launch.ranks import Ranks
from training import hang, watchdog
from training.hang import Investigation, peer_of
from training.watchdog import Bounds, Patience, Watchdog

MINUTE = 60.0


@pytest.fixture(autouse=True)
def _progress():
    watchdog._progress.reset()
    yield
    watchdog._progress.reset()


def lanes() -> dict[str, Patience]:
    return {"main": Patience(), "saver": Patience()}


def test_without_progress_a_step_is_late_after_its_bound():
    watch, seen = Watchdog(WatchdogConfig(minutes=1), Ranks(), Path()), lanes()
    watchdog.beat("step", 7)
    assert [watch.overdue(seen, 25.0) for _ in range(4)] == ["", "", "", "main"]
    watchdog.beat("step", 8)
    assert [watch.overdue(seen, 25.0) for _ in range(4)] == ["", "", "", "main"]


@pytest.mark.parametrize("phase", ["start", "load", "first step", "evaluate", "sample", "save", "finish"])
def test_other_phases_have_an_allowance_of_their_own(phase):
    watch, seen = Watchdog(WatchdogConfig(minutes=1, phase_minutes=2), Ranks(), Path()), lanes()
    watchdog.beat(phase, 7)
    assert [watch.overdue(seen, 50.0) for _ in range(4)] == ["", "", "", "main"]
    watchdog.alive()  # a further batch, in the same phase
    assert watch.overdue(seen, 50.0) == ""


def test_a_saver_that_hangs_is_late_while_training_goes_on():
    watch, seen = Watchdog(WatchdogConfig(minutes=1, phase_minutes=2), Ranks(), Path()), lanes()
    watchdog.saving(6)
    late = []
    for step in range(5):
        watchdog.beat("step", step)
        late.append(watch.overdue(seen, 50.0))
    assert late == ["", "", "", "saver", "saver"]
    watchdog.saving(None)
    assert watch.overdue(seen, 50.0) == ""


def test_the_bound_follows_the_recent_steps():
    bounds = Bounds(WatchdogConfig(phase_minutes=20))
    assert bounds.allowed(("step", 1, 0.0)) == 20 * MINUTE  # nothing is known yet
    bounds.observe(("first step", 0, 0.0))
    bounds.observe(("step", 1, 500.0))
    assert bounds.allowed(("step", 1, 0.0)) == 20 * MINUTE  # the first step compiles
    for step in range(2, 5):
        bounds.observe(("step", step, 500.0 + step))
    assert bounds.allowed(("step", 4, 0.0)) == 5 * MINUTE
    for number in range(1, 9):  # three steps of 40 s each between two looks
        bounds.observe(("step", 4 + 3 * number, 504.0 + 120 * number))
    assert bounds.allowed(("step", 28, 0.0)) == 20 * 40.0
    assert bounds.allowed(("evaluate", 28, 0.0)) == 20 * MINUTE


def test_a_pause_of_the_whole_process_is_no_hang(monkeypatch, set_time, tmp_path):
    """The thread that decides wakes an hour late, as after Ctrl-Z, while its rank could do no more than that."""
    times, ended = iter([0.0, 1.0, 3601.0, 3602.0]), []
    set_time(watchdog, monotonic=lambda: next(times))
    watch = Watchdog(WatchdogConfig(minutes=1), Ranks(), tmp_path)
    stops = iter([False, False, False, True])
    watch._stop = SimpleNamespace(wait=lambda _: next(stops))
    monkeypatch.setattr(watch, "_end", ended.append)
    watchdog.beat("step", 7)
    watch._watch()
    assert ended == []


@pytest.fixture
def alone(tmp_path):
    """The watchdog of a single rank that has begun, and its run folder."""
    watch = Watchdog(WatchdogConfig(), Ranks(), tmp_path)
    watch.interval = 0.5
    watch.start()
    yield watch
    watch.stop()


def test_a_rank_tells_where_it_is(alone, tmp_path):
    watchdog.beat("step", 7)
    thread = threading.Thread(target=alone.write_heartbeat)
    thread.start()
    thread.join()
    found = heartbeats.read(tmp_path / "heartbeats", 0)
    assert (found.pid, found.started, found.world_size) == (os.getpid(), start_of(os.getpid()), 1)
    assert (found.main.phase, found.main.step, found.main.collective) == ("step", 7, "")
    assert "test_watchdog.py:" in found.main.place
    assert found.main.place.endswith(" in test_a_rank_tells_where_it_is")


def test_the_end_of_a_run_leaves_no_heartbeats(alone, tmp_path):
    alone.write_heartbeat()
    alone.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_leaves_word(alone, tmp_path):
    watchdog.beat("evaluate", 7)
    alone.fail()
    assert heartbeats.read(tmp_path / "heartbeats", 0).main.phase == "failed"


def test_rank_0_removes_what_an_earlier_session_left(tmp_path):
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    heartbeats.publish_verdict(folder, Diagnosis(1, 0.0, "of an earlier session"))
    (folder / "rank_3.json").write_text("{}")
    watch = Watchdog(WatchdogConfig(minutes=1), Ranks(0, 4, 0, 4), tmp_path)
    watch.start()
    try:
        assert not (folder / "verdict.json").exists()
        assert not (folder / "rank_3.json").exists()
    finally:
        watch.stop()


def test_a_watchdog_that_is_off_does_nothing(tmp_path):
    watch = Watchdog(WatchdogConfig(minutes=0), Ranks(), tmp_path)
    watch.start()
    watch.stop()
    assert list(tmp_path.iterdir()) == []


def test_stacks_on_demand(alone, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    alone.write_heartbeat()
    waits = threading.Event()
    thread = threading.Thread(target=waits.wait, name="a thread that waits")
    thread.start()
    try:
        assert stacks.main([str(tmp_path)]) == 0
    finally:
        waits.set()
        thread.join()
    printed = capsys.readouterr().out
    assert printed.startswith("rank 0: starting (")
    assert "rank 0, thread MainThread\n" in printed
    assert " in test_stacks_on_demand\n" in printed
    assert "rank 0, thread a thread that waits\n" in printed
    assert "heartbeats\n" not in printed  # the watchdog's own threads


def test_a_run_that_does_not_train_has_no_stacks(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="is not training: no rank writes heartbeats"):
        stacks.main([str(tmp_path)])
    (tmp_path / "heartbeats").mkdir()
    heartbeats.write(tmp_path / "heartbeats", heartbeat(0, interval=0.01))
    with pytest.raises(UserError, match="its heartbeats are those of a run that was killed"):
        stacks.main([str(tmp_path)])


def heartbeat(rank: int, world: int = 1, answered: str = "", **changes) -> Heartbeat:
    main = Activity("step", 7, 1_700_000_000.0, "data/batches.py:88 in samples", "")
    values = {
        "host": "node",
        "pid": 1,
        "started": 2.0,
        "interval": 0.01,
        "count": 1,
        "main": main,
        "answered": answered,
    }
    return Heartbeat(rank, world, **values | changes)


def investigation(tmp_path: Path, rank: int, world: int, **changes) -> Investigation:
    (tmp_path / "heartbeats").mkdir(exist_ok=True)
    arguments = {"told": lambda: None, "recovered": lambda: False, "answer": lambda _: None}
    return Investigation(Ranks(rank, world, rank, world), tmp_path, 0.01, "main", **arguments | changes)


def test_the_lowest_rank_that_lives_speaks_once_and_ends_the_stopped_one(tmp_path, capsys, monkeypatch):
    """Rank 0 is stopped; ranks 1 and 2 write heartbeats, of which rank 1 is the one that speaks."""
    folder, peer = tmp_path / "heartbeats", mock.Mock()
    folder.mkdir()
    monkeypatch.setattr(hang, "peer_of", lambda beat: peer if beat.rank == 0 else None)
    monkeypatch.setattr(hang, "_MARGIN_SECONDS", 0.0)
    heartbeats.write(folder, heartbeat(0, 3))
    counts = iter(range(100))

    def alive(name: str) -> None:
        for rank in (1, 2):
            heartbeats.write(folder, heartbeat(rank, 3, name, count=next(counts)))

    def answer(name: str) -> None:
        path = heartbeats.stacks_of(tmp_path, 1)
        path.parent.mkdir(exist_ok=True)
        path.write_text("the stacks of rank 1\n")
        alive(name)

    asked = investigation(tmp_path, 1, 3, told=lambda: alive(""), answer=answer)
    asked.run()
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "the stacks of rank 1"
    assert printed[-1].startswith("error: the run hangs: waiting for rank 0 since ")
    assert [call.args for call in peer.send_signal.call_args_list] == [(signal.SIGCONT,), (signal.SIGKILL,)]
    ending = read_ending(tmp_path)
    assert (ending.status, ending.exit_status, ending.rank, ending.step) == ("hung", 4, 0, 7)
    assert ending.reason == asked.verdict.sentence

    other = investigation(tmp_path, 2, 3, told=lambda: asked.verdict)
    monkeypatch.setattr(other, "_wait", lambda *_: None)
    other.run()
    assert capsys.readouterr().err == ""
    assert peer.send_signal.call_count == 4


def test_a_rank_that_moves_again_goes_on(tmp_path):
    asked = investigation(tmp_path, 0, 1, recovered=lambda: True)
    asked.run()
    assert (asked.verdict, asked.goes_on) == (None, True)
    assert read_ending(tmp_path) is None
    assert not (tmp_path / "heartbeats" / "verdict.json").exists()


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def test_only_the_process_of_the_heartbeat_is_ended(child, monkeypatch):
    started, host = start_of(child.pid), os.uname().nodename
    beat = heartbeat(1, host=host, pid=child.pid, started=started)
    assert peer_of(beat) is None  # this process is its parent, not its sibling
    monkeypatch.setattr(psutil.Process, "ppid", lambda _: 1)
    assert peer_of(None) is None
    assert peer_of(heartbeat(1, host="another", pid=child.pid, started=started)) is None
    assert peer_of(heartbeat(1, host=host, pid=child.pid, started=started - 60)) is None
    assert peer_of(heartbeat(1, host=host, pid=os.getpid(), started=start_of(os.getpid()))) is None
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 1e9)  # as after a step of the clock
    peer = peer_of(beat)
    assert peer is not None
    assert peer.pid == child.pid


def test_a_process_started_when_psutil_says_so(child):
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME) - start_of(child.pid)
    assert (
        -0.02 < since_boot < time.time() - psutil.Process(child.pid).create_time() + 2
    )  # in ticks; btime is whole seconds
    with pytest.raises(psutil.NoSuchProcess):
        start_of(2**22 + 1)  # beyond the largest number of a process


def test_rank_0_keeps_the_heartbeat_of_a_rank_that_was_faster(child, tmp_path, monkeypatch):
    """If that rank is stopped before its next heartbeat, nothing else tells which process to let go on."""
    monkeypatch.setattr(psutil.Process, "ppid", lambda _: 1)
    (tmp_path / "heartbeats").mkdir()
    host = os.uname().nodename
    for rank, started in ((1, start_of(child.pid)), (2, start_of(child.pid) - 60)):
        beat = heartbeat(rank, host=host, pid=child.pid, started=started)
        (tmp_path / "heartbeats" / f"rank_{rank}.json").write_text(json.dumps(dataclasses.asdict(beat)))
    watch = Watchdog(WatchdogConfig(minutes=1), Ranks(0, 4, 0, 4), tmp_path)
    watch.start()
    try:
        assert heartbeats.read(tmp_path / "heartbeats", 1) is not None
        assert not (tmp_path / "heartbeats" / "rank_2.json").exists()
    finally:
        watch.stop()


@pytest.mark.parametrize("phase", ["start", "load", "step"])
def test_before_its_first_step_a_rank_ends_with_its_launcher(phase, tmp_path, monkeypatch, capsys):
    class Left(BaseException):
        """In place of the end of the process."""

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    watch = Watchdog(WatchdogConfig(), Ranks(), tmp_path, orphaned=lambda: True)
    answers = iter([False, True])
    monkeypatch.setattr(watch._stop, "wait", lambda _: next(answers))
    watchdog.beat(phase, 0)
    if phase == "step":
        watch._watch()  # the training loop stops, and saves
    else:
        with pytest.raises(Left, match="75"):
            watch._watch()
        assert capsys.readouterr().err.startswith("error: the launcher has ended before the first step: run the same")


def test_it_neither_names_a_run_nor_stops_it_from_going_on():
    names = {load([*words, "steps=5"]).run for words in ([], ["watchdog.minutes=3"], ["watchdog.phase_minutes=1"])}
    assert len(names) == 1
