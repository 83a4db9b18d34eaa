"""The campaign of disks: a disk is full, fails, lies or is slow, or a console is gone; then the command runs on a good one.

`disk.c`, which every process loads before libc, makes the disk; `disk_cases.py` lists the cases and what is required of each:
a documented status, no traceback, one line that names the path, healthy checkpoints, and, once the disk is well, the losses of
the undisturbed run to the last bit with no line of metrics.jsonl twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.faults.corrupted_runs import stop_after
from bench.faults.disk_cases import SAVE_EVERY, STEPS, STOPPED, Disk, DiskOutcome, cases, verdict
from bench.faults.kills import last_step, lines
from bench.faults.runs import ROOT, TINY, end_all, launch, write_corpus
from kernels.c.toolchain import find_compiler
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from model.health import damage
from model.weights import checkpoints, step_of

SCRIPT = "train.py"
SOURCE = Path(__file__).with_name("disk.c")
_IMPORTED = ("torch._dynamo", "hydra._internal.hydra", "hydra.compose", "training.run", "training.engine", "training.loop",
             "training.checkpoint", "training.telemetry")  # fmt: skip
_ALONE = "alone"  # the name of the undisturbed run of one rank


def build(to: Path) -> Path:
    """Compile disk.c into a folder and return the library.

    Raises:
        UserError: this is no Linux, or there is no compiler.
    """
    compiler = find_compiler()
    if sys.platform != "linux" or compiler is None:
        missing = "Linux" if sys.platform != "linux" else "a C compiler (cc, gcc or clang)"
        raise UserError(f"a disk that fails needs {missing}: run this campaign on a machine that has it")
    path = to / "disk.so"
    command = [compiler, "-O2", "-fPIC", "-shared", "-std=gnu11", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{compiler} cannot build {SOURCE}: {(done.stderr.splitlines() or ['no message'])[0]}")
    return path


def run_campaign(folder: Path, count: int, seed: int, overrides: list[str]) -> int:  # noqa: ARG001 (nothing is random)
    """Run `count` cases (0: all), print a table, and return 1 if something was wrong, else 0."""
    if "disk.so" not in os.environ.get("LD_PRELOAD", ""):
        library = build(Path(tempfile.mkdtemp(prefix="disk-")))
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)})
    return run_cases(cases()[: count or None], folder, overrides)


def run_cases(chosen: Sequence[Disk], folder: Path, overrides: Sequence[str] = ()) -> int:
    """Run cases in a process that has loaded disk.c; print a table, and return 1 if something was wrong, else 0."""
    for module in _IMPORTED:  # once, and not by each of the processes that are forked
        importlib.import_module(module)
    importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 (it looks for compilers when it is first read)
    campaign = DiskCampaign(folder, overrides)
    wrong = 0
    print(f"{'ranks':>5}  {'launcher':10}{'status':>6}{'steps':>6}{'again':>6}{'seconds':>8}  case", flush=True)
    for number, case in enumerate(chosen):
        began = time.monotonic()
        outcome, problem = campaign.judge(case, number)
        wrong += bool(problem)
        figures = f"{case.ranks:5}  {case.launcher or '-':10}{outcome.status!s:>6}{outcome.steps:6}{outcome.again!s:>6}"
        line = f"{figures}{time.monotonic() - began:8.1f}  {case.what}"
        print(f"{line}: WRONG: {number}.log: {problem}" if problem else line, flush=True)
    print(f"{len(chosen)} disks, {wrong} wrong")
    return 1 if wrong else 0


class DiskCampaign:
    """The folder of a campaign: its corpus, its undisturbed runs, and a run per case."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.runs, self._overrides = folder, folder / "runs", overrides
        self._undisturbed: dict[int, list[tuple]] = {}  # by ranks
        write_corpus(folder / "corpus")
        self.undisturbed(Disk("nothing"))
        self.corpus = next(path.name for path in (folder / "prepared").iterdir() if path.is_dir()).lstrip(".")
        self.stopped = folder / "stopped"
        shutil.copytree(self.runs / _ALONE, self.stopped)
        stop_after(self.stopped, STOPPED, range(SAVE_EVERY, STOPPED + 1, SAVE_EVERY))

    def undisturbed(self, case: Disk) -> list[tuple]:
        """Return the lines of the run of as many ranks without any fault."""
        if case.ranks not in self._undisturbed:
            name = _ALONE if case.ranks == 1 else f"of {case.ranks}"
            plain = Disk("nothing", ranks=case.ranks, launcher=case.launcher)
            status, output, _ = self._session(plain, name, ())
            if status != 0:
                raise UserError(f"a run fails on a good disk: {output}")
            self._undisturbed[case.ranks] = lines(self.runs / name)
        return self._undisturbed[case.ranks]

    def judge(self, case: Disk, number: int) -> tuple[DiskOutcome, str]:
        """Run a case, and the same command on a good disk; return what came of it, and what is wrong with that."""
        undisturbed, name = self.undisturbed(case), str(number)
        run = self.runs / name
        if case.resumed:
            shutil.copytree(self.stopped, run)
        names = self._names(case, name)
        (self.runs / "wandb").mkdir(exist_ok=True)
        status, output, strays = self._session(case, name, [rule.format(**names) for rule in case.rules])
        printed = map(int, re.findall(r"^step +(\d+)/", output, re.MULTILINE))  # files may be what failed
        steps = max([last_step(run), *map(step_of, checkpoints(run / "checkpoints")), *printed])
        beside = self._beside(run)
        damaged = tuple(f"{path}: {problem}" for path in checkpoints(run / "checkpoints") if (problem := damage(path)))
        well = Disk(case.what, ranks=case.ranks, launcher=case.launcher, corpus=case.corpus)
        again, output_again, _ = self._session(well, name, ())
        (self.folder / f"{name}.log").write_text(f"{output}\n--- again ---\n{output_again}", encoding="utf-8")
        outcome = DiskOutcome(status, output, steps, damaged, beside, strays, again, lines(run))
        expected = Disk(**{**vars(case), "names": tuple(part.format(**names) for part in case.names)})
        problem = verdict(expected, outcome, undisturbed)
        if not problem:
            shutil.rmtree(run, ignore_errors=True)
        return outcome, problem

    def _names(self, case: Disk, name: str) -> dict[str, str]:
        own = self.folder / f"own {name}" if case.corpus else self.folder
        places = {"run": self.runs / name, "prepared": own / "prepared", "cache": own / "cache"}
        known = {key: str(path) for key, path in places.items()} | {"log": str(self.folder / f"{name}.out")}
        return known | {"corpus": getattr(self, "corpus", "")}

    def _beside(self, run: Path) -> bool:
        """Return whether training waited less for each save of a second or more than it took: others are noise."""
        with contextlib.suppress(OSError):
            events = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            slow = [event for event in events if event.get("event") == "saved" and event["seconds"] >= 1]
            return all(event["waited_seconds"] < 0.5 * event["seconds"] for event in slow)
        return True

    def _session(self, case: Disk, name: str, rules: Sequence[str]) -> tuple[int | None, str, int]:
        """Run the command of a run on a disk; return its status (None: it did not end), its output, and the strays."""
        names = self._names(case, name)
        lengths = [f"steps={STEPS}", f"save_every={SAVE_EVERY}"]
        places = [f"data.path={self.folder / 'corpus'}", f"data.prepared={names['prepared']}", f"runs={self.runs}"]
        words = [*TINY, *lengths, *places, f"run={name}", *case.overrides, *self._overrides]
        variables = {"DISK_FAULTS": "\n".join(rules), "WANDB_MODE": "offline", "RUNS": str(self.runs)}
        if case.corpus:
            variables["XDG_CACHE_HOME"] = names["cache"]
        log = Path(names["log"])
        log.unlink(missing_ok=True)
        if case.shell or case.launcher:
            status, strays = self._started(case, words, log, variables)
        else:
            status, strays = _forked(words, log, variables, case.seconds), 0
        return status, log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", strays

    def _started(self, case: Disk, words: list[str], log: Path, variables: dict[str, str]) -> tuple[int | None, int]:
        """Start a session below a launcher or a shell; return its status and the number of strays."""
        if case.shell == "terminal":
            return _in_terminal(words, log, variables, case.seconds)
        shell = ("bash", "-c", case.shell, "bash") if case.shell else ()
        process = launch(case.launcher, case.ranks, SCRIPT, words, log, shell, **variables)
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(case.seconds)
        return status, end_all(process.pid)


def _forked(words: list[str], log: Path, variables: dict[str, str], seconds: float) -> int | None:
    """Run train.py in a fork of this process, which has imported all that it needs; return its status, None: it waits."""
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.alarm(int(seconds))
        from kernels.common.streams import outlive_console
        from launch.ranks import leave_after
        from train import main

        os.environ.update(variables)
        sys.argv = ["train.py", *words]
        ctypes.CDLL(None).disk_faults(variables["DISK_FAULTS"].encode())
        outlive_console()
        leave_after(lambda: run_command(main))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGALRM else status


def _in_terminal(words: list[str], log: Path, variables: dict[str, str], seconds: float) -> tuple[int | None, int]:
    """Run train.py in a terminal that hangs up after its second step; return its status, None: it waits, and the strays."""
    child, terminal = pty.fork()
    if not child:
        os.environ.update(variables, OMP_NUM_THREADS="1")
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, SCRIPT, *words])
    shown, until = b"", time.monotonic() + seconds
    while not re.search(rb"step +2/", shown) and time.monotonic() < until:
        with contextlib.suppress(OSError):
            shown += os.read(terminal, 1 << 12)
    os.close(terminal)
    log.write_bytes(shown)
    status = None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.1)
    return status, end_all(child)
