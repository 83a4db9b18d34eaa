"""Heartbeats, what each rank of a live run is doing, and which rank keeps the others waiting.

A rank that hangs takes part in no collective, so ranks tell one another by files in the run folder:

    heartbeats/rank_N.json    written every few seconds by a thread of rank N (training/watchdog.py)
               verdict.json   who keeps the others waiting; every rank that finds it ends
               request.json   asks every rank for its stacks (launch/stacks.py)
    stacks/rank_N.txt         the stacks of rank N, in answer to either
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.common.json_files import read_object

_DOING = {  # by phase, of `step` steps that are done
    "start": "starting",
    "load": "loading the checkpoint",
    "first step": "in its first step, step {next}",
    "step": "in step {next}",
    "evaluate": "evaluating after step {step}",
    "sample": "sampling after step {step}",
    "save": "saving the checkpoint of step {step}",
    "finish": "finishing after step {step}",
    "failed": "it has failed after step {step}",
}


@dataclasses.dataclass(frozen=True)
class Activity:
    """What a thread of a rank is doing."""

    phase: str  # one of _DOING
    step: int  # steps that are done
    since: float  # time.time() of its last progress
    place: str  # where in this code, such as "training/loop.py:251 in _train_step"; "": unknown
    collective: str  # the one that it is in, such as "all_reduce"; "": none

    @property
    def doing(self) -> str:
        """Return what it is doing as a part of a sentence."""
        text = _DOING.get(self.phase, "in {phase}").format(phase=self.phase, step=self.step, next=self.step + 1)
        where = f"{self.collective}, {self.place}" if self.collective and self.place else self.collective or self.place
        return f"{text} ({where})" if where else text


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """The life of a rank at one time."""

    rank: int
    world_size: int
    host: str
    pid: int
    started: float  # `start_of` its process: one that is given the same number later differs
    interval: float  # seconds until the next one
    count: int  # heartbeats so far
    main: Activity
    saver: Activity | None = None  # of the thread that writes a checkpoint, while it does
    answered: str = ""  # the verdict or request for which its stacks were written last


def start_of(pid: int) -> float:
    """Return when a process started: on Linux in seconds since boot, which no change of the clock moves; else in Unix time.

    Raises:
        psutil.Error: there is none of that number.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime of proc(5)
    import psutil

    return psutil.Process(pid).create_time()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Which rank keeps the others waiting."""

    rank: int
    since: float  # time.time() of its last progress; 0: it never had any
    sentence: str
    silent: tuple[int, ...] = ()  # ranks that write no heartbeat any more
    step: int = 0
    name: str = ""  # distinguishes it from those of other sessions


def folder_of(run: Path) -> Path:
    """Return the folder of a run's heartbeats."""
    return run / "heartbeats"


def stacks_of(run: Path, rank: int) -> Path:
    """Return the file with a rank's stacks."""
    return run / "stacks" / f"rank_{rank}.txt"


def flights_of(run: Path) -> Path:
    """Return the beginning of the names of the files with NCCL's last collectives; a rank's number follows."""
    return run / "stacks" / "nccl_rank_"


def replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file in one step. It is not synced: it does not matter after a crash.

    Raises:
        OSError: it cannot be written; also if its folder does not exist.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write(folder: Path, heartbeat: Heartbeat) -> None:
    """Write a rank's heartbeat.

    Raises:
        OSError: it cannot be written; also if the folder does not exist.
    """
    replace(folder / f"rank_{heartbeat.rank}.json", dataclasses.asdict(heartbeat))


def read(folder: Path, rank: int) -> Heartbeat | None:
    """Return a rank's last heartbeat; None if there is none that can be read."""
    try:
        values = read_object(folder / f"rank_{rank}.json", 1 << 16)
        saver = values.get("saver")
        threads = {"main": Activity(**values["main"]), "saver": Activity(**saver) if saver else None}
        heartbeat = Heartbeat(**values | threads)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return heartbeat if _typed(heartbeat) and heartbeat.rank == rank else None


def read_all(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """Return the last heartbeat of each rank that has one."""
    found = ((rank, read(folder, rank)) for rank in range(world_size))
    return {rank: heartbeat for rank, heartbeat in found if heartbeat is not None}


def read_verdict(folder: Path) -> Diagnosis | None:
    """Return the verdict of a run; None if there is none that can be read."""
    try:
        values: dict[str, Any] = read_object(folder / "verdict.json", 1 << 20)
        values["silent"] = tuple(map(int, values["silent"]))
        verdict = Diagnosis(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return verdict if _typed(verdict) else None


def publish_verdict(folder: Path, verdict: Diagnosis) -> Diagnosis:
    """Write a verdict unless another rank was faster; return the one that counts.

    Raises:
        OSError: it cannot be written.
    """
    verdict = dataclasses.replace(verdict, name=uuid.uuid4().hex)
    path = folder / "verdict.json"
    temporary = folder / f".verdict.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(verdict)), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename it replaces nothing
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return read_verdict(folder) or verdict


def publish_request(folder: Path) -> str:
    """Ask every rank for its stacks; return the name of the request.

    Raises:
        OSError: it cannot be written.
    """
    name = uuid.uuid4().hex
    replace(folder / "request.json", {"name": name})
    return name


def read_request(folder: Path) -> str:
    """Return the name of the last request for stacks; "" if there is none that can be read."""
    try:
        return str(read_object(folder / "request.json", 1 << 12).get("name", ""))
    except (OSError, ValueError):
        return ""


def _typed(value: Any) -> bool:
    """Return whether the numbers and texts of a record that was read from a file are ones."""
    kinds = {"int": (int,), "float": (int, float), "str": (str,)}
    fields = [field for field in dataclasses.fields(value) if field.type in kinds]
    whole = all(type(getattr(value, field.name)) in kinds[str(field.type)] for field in fields)
    return whole and all(_typed(getattr(value, name)) for name in ("main", "saver") if getattr(value, name, None))


def diagnose(
    first: Mapping[int, Heartbeat], second: Mapping[int, Heartbeat], world_size: int, lane: str = "main"
) -> Diagnosis:
    """Return which rank keeps the others waiting, from two looks at the heartbeats that lie some intervals apart.

    That is a rank without a new heartbeat; else one that is in no collective while others are; else the one furthest behind.

    Args:
        first, second: {rank: its heartbeat}.
        lane: the threads that make no progress: main or saver.
    """
    failed = [rank for rank, beat in second.items() if beat.main.phase == "failed"]
    silent = tuple(
        rank
        for rank in range(world_size)
        if rank not in failed and (rank not in second or (rank in first and first[rank].count == second[rank].count))
    )
    if failed:
        return _verdict(min(failed, key=lambda rank: second[rank].main.since), second, lane, silent)
    if len(silent) == world_size:
        last = max((beat.main.since for beat in second.values()), default=0.0)
        return Diagnosis(0, last, "no rank can write to the run folder", ())
    if silent:
        heard = [rank for rank in silent if rank in second]
        rank = min(heard, key=lambda rank: second[rank].main.since) if heard else silent[0]
        return _verdict(rank, second, lane, silent)
    if lane == "saver":
        savers = {rank: beat.saver for rank, beat in second.items() if beat.saver}
        outside = {rank: saver for rank, saver in savers.items() if not saver.collective}
        if outside:
            return _verdict(min(outside, key=lambda rank: outside[rank].since), second, lane)
        second_main = {rank: beat for rank, beat in second.items() if not beat.saver} or second
    else:
        second_main = second
    return _stuck(first, second_main)


def _stuck(first: Mapping[int, Heartbeat], second: Mapping[int, Heartbeat]) -> Diagnosis:
    """Return which of the ranks that write heartbeats keeps the others waiting with its main thread."""
    still = {
        rank: beat for rank, beat in second.items() if rank not in first or first[rank].main.since == beat.main.since
    }
    ranks = still or second

    def progress(rank: int) -> tuple[int, float]:
        return ranks[rank].main.step, ranks[rank].main.since

    outside = [rank for rank, beat in ranks.items() if not beat.main.collective]
    if outside:
        return _verdict(min(outside, key=progress), second, "main")
    rank = min(ranks, key=progress)
    if len({beat.main.step for beat in ranks.values()}) == 1:
        # All of them wait, in different collectives: the one that is not where most are.
        places = Counter((beat.main.collective, beat.main.place) for beat in ranks.values())
        rank = min(ranks, key=lambda r: (places[ranks[r].main.collective, ranks[r].main.place], progress(r)))
    verdict = _verdict(rank, second, "main")
    return dataclasses.replace(verdict, sentence=f"all ranks wait in collectives; {verdict.sentence}")


def _verdict(rank: int, beats: Mapping[int, Heartbeat], lane: str, silent: tuple[int, ...] = ()) -> Diagnosis:
    beat = beats.get(rank)
    if beat is None:
        return Diagnosis(rank, 0.0, f"waiting for rank {rank}: it has written no heartbeat", silent)
    activity = beat.saver if lane == "saver" and beat.saver else beat.main
    doing = activity.doing
    if rank in silent:
        doing = f"its process on {beat.host} writes no heartbeat any more; it was {doing}"
    elif activity.phase != "failed":
        doing = f"it is {doing}"
    sentence = f"waiting for rank {rank} since {clock(activity.since)}: {doing}"
    return Diagnosis(rank, activity.since, sentence, silent, activity.step)


def clock(seconds: float) -> str:
    """Return a time of day, with the date unless it is today's."""
    then = time.localtime(seconds)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
