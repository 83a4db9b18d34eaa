"""The cases of the campaign of disks: what fails, and what is required of a run that meets it. `disks.py` runs them."""

from __future__ import annotations

import dataclasses
import errno

STEPS, SAVE_EVERY = 12, 3
STOPPED = 9  # the step after which runs were stopped that are resumed from a disk that reads wrong bytes
STATUSES = (0, 1, 2, 3, 4, 75)  # those that docs/training.md documents
FULL, QUOTA, BROKEN, READ_ONLY = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS
_REASONS = {FULL: "disk is full", QUOTA: "quota is used up", BROKEN: "disk reports an error", READ_ONLY: "is read-only"}
_SEVERAL = ("open", "mkdir", "rename", "write")  # the calls that a file system refuses once it is read-only
_SHARD = "train-00000.bin"
_TENSORS = "rank_00000.safetensors"


def rule(
    call: str, path: str, action: str = "error", value: int = FULL, first: int = 1, last: int = 0, byte: int = 0
) -> str:
    """Return a rule of disk.c. In `path`, {folder} is the campaign's folder and {run} the run's."""
    return f"{call} {action} {value} {first} {last} {byte} {path}"


@dataclasses.dataclass(frozen=True)
class Disk:
    """One way in which a disk fails, or a console, and what is required of a run on it."""

    what: str
    rules: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (0,)  # with which the session may end
    trains: bool = True  # whether the session takes all steps
    names: tuple[str, ...] = ()  # what one line of its output has: a path, and what is wrong with it
    loses: bool = False  # whether lines of metrics.jsonl may be missing: the session ended before they could be written
    resumed: bool = False  # a run that was stopped after STOPPED goes on; else it starts
    ranks: int = 1
    launcher: str = ""  # one of runs.LAUNCHERS; "": none
    shell: str = ""  # how bash starts the command "$@"; "terminal": in one that hangs up
    overrides: tuple[str, ...] = ()
    corpus: str = ""  # prepare a corpus of its own, and a cache of kernels; "": those of the campaign
    seconds: float = 120.0  # after which a session is taken to wait for ever


@dataclasses.dataclass(frozen=True)
class DiskOutcome:
    """What came of a session on a failing disk, and of the same command on one that is well again."""

    status: int | None  # None: it did not end
    output: str
    steps: int  # taken at its end
    damaged: tuple[str, ...]  # checkpoints that are not healthy, and why
    beside: bool  # whether training went on beside every save
    strays: int
    again: int | None  # status of the same command
    lines: list[tuple]  # of metrics.jsonl at the end: (kind, step, loss, gradient norm)


def verdict(case: Disk, outcome: DiskOutcome, undisturbed: list[tuple]) -> str:
    """Return what is wrong with an outcome; "": nothing.

    Args:
        undisturbed: the lines of the run without any fault.
    """
    if outcome.status is None:
        return "it did not end"
    if outcome.status not in STATUSES or outcome.status not in case.statuses:
        return f"its status is {outcome.status}, not {' or '.join(map(str, case.statuses))}"
    if "Traceback" in outcome.output:
        return "it prints a traceback"
    if case.names and not any(all(part in line for part in case.names) for line in outcome.output.splitlines()):
        return f"no line names {' and '.join(case.names)}"
    if case.trains and outcome.steps != STEPS:
        return f"it ended after step {outcome.steps}"
    if outcome.damaged:
        return f"a complete checkpoint is damaged: {outcome.damaged[0]}"
    if not outcome.beside:
        return "training waited for a save"
    if outcome.strays:
        return f"{outcome.strays} processes stayed behind"
    if outcome.again != 0:
        return f"the same command ends with {outcome.again}"
    if len(set(outcome.lines)) != len(outcome.lines):
        return "metrics.jsonl has a line twice"
    strange = [line for line in outcome.lines if line not in undisturbed]
    if strange:
        return f"its losses are not those of the undisturbed run: {strange[0]}"
    missing = len(undisturbed) - len(outcome.lines)
    return f"{missing} line(s) of metrics.jsonl are missing" if missing and not case.loses else ""


def cases() -> list[Disk]:
    """Return every case; the cheapest of each kind come first."""
    return [*_checkpoints(), *_records(), *_places(), *_reads(), *_consoles(), *_slow()]


def _why(error: int, path: str) -> tuple[str, ...]:
    return path, _REASONS[error]


def _checkpoints() -> list[Disk]:
    """Return the cases in which checkpoints cannot be written, for a while or for good."""
    found = []
    for launcher, ranks in (("", 1), ("torchrun", 2), ("deepspeed", 2)):
        rank = ranks - 1
        file = f".tmp/rank_{rank:05d}.safetensors"
        places = [
            ("first byte", "write", FULL, 1, 1, 0),
            ("middle", "write", QUOTA, 1, 0, 20_000),
            ("fsync", "fsync", BROKEN, 1, 1, 0),
            ("open", "open", READ_ONLY, 1, 1, 0),
        ]
        for place, call, error, first, last, byte in places if not launcher else places[1:3]:
            what = f"{errno.errorcode[error]}, a rank's file, {place}, {'the first saves' if last else 'for good'}"
            statuses = (0,) if last else (75,)
            rules = (rule(call, file, value=error, first=first, last=last, byte=byte),)
            names = _why(error, file.rsplit("/", 1)[-1])
            found.append(Disk(what, rules, statuses, names=names, ranks=ranks, launcher=launcher))
    for name, error in (("index.json", FULL), ("state.json", BROKEN), ("manifest.json", QUOTA)):
        rules = (rule("write", f".tmp/{name}", value=error, last=2),)
        found.append(Disk(f"{errno.errorcode[error]}, {name}, the first saves", rules, names=_why(error, name)))
    for error, last, statuses in ((FULL, 1, (0,)), (BROKEN, 0, (75,)), (READ_ONLY, 0, (1,))):
        what = f"{errno.errorcode[error]}, the rename of a checkpoint, {'the first' if last else 'for good'}"
        rules = (rule("rename", "/checkpoints/step_", value=error, last=last),)
        found.append(Disk(what, rules, statuses, names=_why(error, "step_")))
    rules = (rule("fsync", "/checkpoints", value=BROKEN, first=1, last=0),)
    found.append(Disk("EIO, every fsync of a checkpoint", rules, (75,), names=_why(BROKEN, "checkpoints")))
    return found


def _records() -> list[Disk]:
    """Return the cases in which the files of the run folder cannot be written."""
    found = []
    for error, first, last in ((FULL, 3, 6), (BROKEN, 4, 9), (FULL, 5, 0), (READ_ONLY, 1, 0)):
        rules = (rule("write", "/metrics.jsonl", value=error, first=first, last=last),)
        what = f"{errno.errorcode[error]}, metrics.jsonl, {f'writes {first} to {last}' if last else 'for good'}"
        statuses = (0,) if last else (1,) if error == READ_ONLY else (75,)
        found.append(Disk(what, rules, statuses, names=_why(error, "metrics.jsonl"), loses=not last))
    rules = (rule("write", "/metrics.jsonl", value=QUOTA, byte=1500),)
    found.append(
        Disk("EDQUOT, metrics.jsonl, after 1,500 bytes", rules, (75,), names=_why(QUOTA, "metrics"), loses=True)
    )
    rules = (rule("fsync", "/metrics.jsonl", value=BROKEN),)
    found.append(Disk("EIO, metrics.jsonl, fsync", rules, (75,), names=_why(BROKEN, "metrics.jsonl")))
    for error, status in ((FULL, 75), (READ_ONLY, 1)):
        rules = (rule("open", "summary.json", value=error), rule("open", "ending.json", value=error))
        what = f"{errno.errorcode[error]}, summary.json and ending.json"
        found.append(Disk(what, rules, (status,), names=_why(error, "summary.json")))
    for name, call, error, status in (
        ("config.yaml", "write", FULL, 75),
        ("config.yaml", "rename", READ_ONLY, 2),
        ("config.yaml", "fsync", BROKEN, 75),
        ("provenance.json", "write", FULL, 75),
        ("deepspeed.log", "open", FULL, 75),
        ("tokenizer", "rename", QUOTA, 75),
        (".lock", "open", BROKEN, 75),
    ):
        rules = (rule(call, f"{{run}}/{name}" if name == ".lock" else name, value=error),)
        if name in ("tokenizer", "deepspeed.log"):
            rules = (rule(call, f"{{run}}/{name}", value=error),)
        what = f"{errno.errorcode[error]}, {name}, {call}"
        found.append(Disk(what, rules, (status,), trains=False, names=_why(error, "{run}")))
    rules = tuple(rule(call, "/heartbeats/") for call in _SEVERAL)
    found.append(Disk("ENOSPC, heartbeats, for good, two ranks", rules, ranks=2, launcher="torchrun"))
    return found


def _places() -> list[Disk]:
    """Return the cases in which whole folders cannot be written."""
    run = "{run}/"
    after = dict(zip(_SEVERAL, (30, 8, 12, 60), strict=True))
    full = tuple(rule(call, run, first=after[call]) for call in _SEVERAL)
    broken = tuple(rule(call, run, value=READ_ONLY, first=after[call]) for call in _SEVERAL)
    prepared = "{prepared}/"
    found = [
        Disk("ENOSPC, the run folder, from its middle on", full, (75,), names=_why(FULL, "{run}"), loses=True),
        Disk("EROFS, the run folder, from its middle on", broken, (1,), names=_why(READ_ONLY, "{run}"), loses=True),
    ]
    for error, call, first, status in (
        (FULL, "write", 1, 75),
        (FULL, "write", 4, 75),
        (QUOTA, "mkdir", 1, 75),
        (BROKEN, "fsync", 2, 75),
        (READ_ONLY, "open", 1, 2),
    ):
        what = f"{errno.errorcode[error]}, the corpus while it is prepared, {call} {first}"
        names = _why(error, "{prepared}")
        rules = (rule(call, prepared, value=error, first=first),)
        found.append(Disk(what, rules, (status,), trains=False, names=names, corpus="own"))
    for error, call in ((FULL, "write"), (READ_ONLY, "open"), (BROKEN, "rename")):
        rules = (rule(call, "{cache}/", value=error),)
        found.append(Disk(f"{errno.errorcode[error]}, the cache of C kernels, {call}", rules, corpus="own"))
    offline = ("logger=wandb",)
    for call in ("mkdir", "open"):
        rules = (rule(call, "/wandb/"),)
        what = f"ENOSPC, W&B's offline folder, {call}"
        found.append(Disk(what, rules, names=("W&B is off",), overrides=offline))
    shell = 'exec unshare -rm sh -c \'mount -t tmpfs -o size=32k none "$RUNS/wandb" && exec "$@"\' sh "$@"'
    found.append(Disk("ENOSPC, W&B's offline folder, a file system of 32 KiB", shell=shell, overrides=offline))
    return found


def _reads() -> list[Disk]:
    """Return the cases in which reading gives wrong bytes, or none."""
    found = []
    step = f"step_{STOPPED:08d}/"
    for name, byte in (
        (_TENSORS, 30_000),
        (_TENSORS, 40),
        ("index.json", 50),
        ("state.json", 90),
        ("manifest.json", 70),
    ):
        rules = (rule("read", step + name, "flip", 1, byte=byte),)
        names = (step.rstrip("/"), "was skipped")
        found.append(
            Disk(f"a wrong bit, {name} of the newest checkpoint, byte {byte}", rules, names=names, resumed=True)
        )
    rules = (rule("read", _TENSORS, "flip", 4, byte=30_000),)
    names = ("checkpoints", "can be used")
    found.append(Disk("a wrong bit, the tensors of all checkpoints", rules, (2,), False, names, resumed=True))
    for name in (_TENSORS, "state.json"):
        rules = (rule("read", step + name, value=BROKEN),)
        names = (step.rstrip("/"), "was skipped")
        found.append(Disk(f"EIO, reading {name} of the newest checkpoint", rules, names=names, resumed=True))
    for name, byte, path in (
        ("index.json", 100, "{prepared}"),
        (_SHARD, 2_000, "{prepared}"),
        ("train-00000.idx", 40, "{prepared}"),
        ("tokenizer.model", 300, "{prepared}"),
    ):
        rules = (rule("read", f"{{prepared}}/{{corpus}}/{name}", "flip", 1, byte=byte),)
        found.append(Disk(f"a wrong bit, {name} of the corpus", rules, (2,), False, (path,), resumed=True))
    for name in (_SHARD, "index.json"):
        rules = (rule("read", f"{{prepared}}/{{corpus}}/{name}", value=BROKEN),)
        found.append(Disk(f"EIO, reading {name} of the corpus", rules, (2, 75), False, ("{prepared}",), resumed=True))
    rules = (rule("read", "{run}/config.yaml", value=BROKEN),)
    found.append(Disk("EIO, reading config.yaml", rules, (0, 2, 75), False, ("config.yaml",), resumed=True))
    rules = (rule("read", "{run}/metrics.jsonl", value=BROKEN),)
    found.append(Disk("EIO, reading metrics.jsonl", rules, (0, 2, 75), False, ("metrics.jsonl",), resumed=True))
    return found


def _consoles() -> list[Disk]:
    """Return the cases in which the console is gone or cannot be written."""
    pipe = "set -o pipefail; "
    return [
        Disk("ENOSPC, the console's file, from byte 200", (rule("write", "{log}", byte=200),)),
        Disk("EIO, the console's file", (rule("write", "{log}", value=BROKEN),)),
        Disk("a closed pipe (| head -3)", shell=f'{pipe}"$@" 2>&1 | head -3'),
        Disk("a closed pipe (| true), two ranks", shell=f'{pipe}"$@" 2>&1 | true', ranks=2, launcher="torchrun"),
        Disk("closed streams (>&- 2>&-)", shell='exec "$@" >&- 2>&-'),
        Disk("/dev/full", shell='exec "$@" > /dev/full 2>&1'),
        Disk("a terminal that hangs up", shell="terminal", trains=False, overrides=("log_every=1",)),
    ]


def _slow() -> list[Disk]:
    """Return the cases in which every write and sync takes long."""
    slow = (rule("write", "{run}/", "delay", 20), rule("fsync", "{run}/", "delay", 2000))
    bounds = ("watchdog.minutes=0.5", "watchdog.phase_minutes=1")
    return [
        Disk("slow: writes 20 ms, fsync 2 s", slow, overrides=bounds, seconds=600.0),
        Disk("slow: writes 20 ms, fsync 2 s", slow, overrides=bounds, seconds=600.0, ranks=2, launcher="torchrun"),
    ]
