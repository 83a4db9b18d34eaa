"""What the campaigns share: tiny runs, the launchers that start them, and the processes of a launcher."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from launch.ranks import without_launcher

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("torchrun", "deepspeed")
_MARK = "BENCH_FAULTS_MARK"  # a variable of all processes that a launcher starts
_marks: dict[int, str] = {}  # by process id of the launcher
TINY = [
    *(
        "data=text",
        "model.d_model=32",
        "model.n_layers=2",
        "model.n_heads=2",
        "model.d_ff=48",
        "tokenizer.vocab_size=384",
    ),
    *(
        "sequence_length=32",
        "global_batch_size=8",
        "steps=12",
        "save_every=3",
        "keep_last=9",
        "eval_every=0",
        "precision=fp32",
    ),
    *(
        "logger=none",
        "log_seconds=0",
        "telemetry_every=0",
        "sample_tokens=4",
        "data.workers=1",
        "data.max_epochs=1000000",
    ),
]


def write_corpus(folder: Path) -> None:
    """Write a corpus of made-up words for tiny runs."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnoprstuvwyz", k=generator.randint(2, 7))) for _ in range(200)]
    for number in range(40):
        text = "\n".join(" ".join(generator.choices(words, k=8)) for _ in range(20))
        (folder / f"{number}.txt").write_text(text + "\n", encoding="utf-8")


def launch(
    launcher: str,
    ranks: int,
    script: str,
    overrides: Sequence[str],
    log: Path,
    before: Sequence[str] = (),
    **variables: str,
) -> subprocess.Popen[bytes]:
    """Start a script of the project on some ranks, in a session of its own, with one thread each; return its launcher.

    Args:
        launcher: one of LAUNCHERS; "": none, one rank is the process itself.
        script: relative to the project's root.
        log: takes what all processes print, after what it has already.
        before: words of a command that starts the launcher's.
        variables: to add to the environment.
    """
    scripts = Path(sys.executable).parent
    commands = {
        "": [sys.executable],
        "torchrun": [scripts / "torchrun", "--standalone", f"--nproc-per-node={ranks}"],
        "deepspeed": [sys.executable, scripts / "deepspeed", f"--num_gpus={ranks}"],
    }
    mark = uuid.uuid4().hex
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), _MARK: mark}
    environment = {**without_launcher(os.environ), **fixed, **variables}
    words = list(map(str, [*before, *commands[launcher], script, *overrides]))
    with open(log, "ab") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    _marks[process.pid] = mark
    return process


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float, poll: float = 0.1
) -> bool:
    """Return True as soon as something has happened; False where the process has ended, or after some seconds."""
    until = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(poll)
    return True


def ranks_of(launcher: int, script: str) -> dict[int, psutil.Process]:
    """Return {rank: process} of the ranks below the launcher with this process id."""
    found: dict[int, psutil.Process] = {}
    for process in _descendants(launcher):
        with contextlib.suppress(psutil.Error, ValueError, KeyError):
            program = next((word for word in process.cmdline()[1:] if not word.startswith("-")), "")
            if program.endswith(script):
                found[int(process.environ()["RANK"])] = process
    return found


def members(launcher: int) -> list[psutil.Process]:
    """Return the processes that are alive of those that a launcher started, itself included; a fork's by their session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            own = os.getsid(process.pid) == launcher  # ranks of torchrun have sessions of their own
            if launcher in _marks:
                own |= process.environ().get(_MARK) == _marks[launcher]
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(launcher: int) -> int:
    """Kill what is left of a launcher's processes; return how many that were."""
    time.sleep(1.0)  # the parent of a killed process takes its status
    left = members(launcher)
    kill(left)
    return len(left)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL to processes, of which some may have ended."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _descendants(launcher: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        yield from psutil.Process(launcher).children(recursive=True)
