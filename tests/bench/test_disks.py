"""The campaign of disks in short: a full disk, and one that reads wrong bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from bench.faults.disk_cases import STATUSES, STEPS, Disk, DiskOutcome, cases, rule, verdict
from bench.faults.disks import build
from kernels.c.toolchain import find_compiler
from kernels.common.errors import ExitStatus, UserError
from tests.training.tiny import PATIENCE, ROOT, environment

SHORT = (
    "EDQUOT, a rank's file, middle, for good",
    "a wrong bit, rank_00000.safetensors of the newest checkpoint, byte 30000",
)
RUN = """
import sys
from pathlib import Path
from bench.faults.disks import cases, run_cases
chosen = [case for case in cases() if case.what in sys.argv[2:] and not case.launcher]
sys.exit(run_cases(chosen, Path(sys.argv[1])))
"""
LINES = [("train", step, 1.0 / step, 2.0) for step in range(1, STEPS + 1)]
CASE = Disk("a full disk", statuses=(75,), names=("metrics.jsonl", "is full"))
GOOD = DiskOutcome(75, "warning: runs/a/metrics.jsonl: the disk is full", STEPS, (), True, 0, 0, LINES)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library of disk.c."""
    if sys.platform != "linux" or find_compiler() is None:
        pytest.skip("a disk that fails needs Linux and a C compiler")
    return build(tmp_path_factory.mktemp("disk"))


def on_disk(library, faults: list[str], program: str) -> str:
    """Return what a program prints on a disk with these faults.

    A fault names its file by the whole path: by a part of it, it would fit files of the interpreter in some checkouts.
    """
    variables = environment(LD_PRELOAD=str(library), DISK_FAULTS="\n".join(faults))
    return subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("whats", [SHORT[1:], pytest.param(SHORT, marks=pytest.mark.slow)], ids=["a wrong bit", "both"])
def test_runs_on_disks_that_fail(library, tmp_path, whats):
    command = [sys.executable, "-c", RUN, str(tmp_path / "campaign"), *whats]
    variables = environment(LD_PRELOAD=str(library))
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(whats)} disks, 0 wrong"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_may_grow_to_a_size_and_no_further(library, tmp_path, number):
    program = f"""
import os
file = os.open({str(tmp_path / "a file")!r}, os.O_WRONLY | os.O_CREAT)
print(os.write(file, bytes(60)), os.write(file, bytes(60)))
try: os.write(file, bytes(60))
except OSError as error: print(error.errno)
"""
    assert on_disk(library, [rule("write", str(tmp_path), value=number, byte=100)], program) == f"60 40\n{number}"


def test_calls_fail_from_the_first_to_the_last_that_is_named(library, tmp_path):
    path = str(tmp_path / "b")
    program = f"""
import os
def refused(action):
    try: action()
    except OSError: return 1
    return 0
path = {path!r}
file = os.open(path, os.O_WRONLY | os.O_CREAT)
print([refused(lambda: os.fsync(file)) for _ in range(4)], [refused(lambda: os.open(path, os.O_RDWR)) for _ in "ab"],
      [refused(lambda: os.open(path, os.O_RDONLY)) for _ in "ab"], [refused(lambda: os.replace(path, path)) for _ in "ab"])
"""
    faults = [rule("fsync", path, first=2, last=3), rule("open", path, first=2), rule("rename", path, last=1)]
    assert on_disk(library, faults, program) == "[0, 1, 1, 0] [1, 1] [0, 0] [1, 0]"


def test_a_bit_is_read_wrong_whether_the_file_is_read_or_mapped(library, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"abcdef")
    program = f"""
import mmap, os
file = os.open({str(path)!r}, os.O_RDONLY)
print(os.read(file, 2), os.read(file, 9), os.pread(file, 3, 1), mmap.mmap(file, 0, prot=mmap.PROT_READ)[:])
"""
    faults = [rule("read", str(path), "flip", 1, byte=2 + 6)]
    assert on_disk(library, faults, program) == "b'ab' b'bdef' b'bbd' b'abbdef'"


def test_a_rule_that_is_none_ends_the_program(library):
    done = subprocess.run(["true"], env={**os.environ, "LD_PRELOAD": str(library), "DISK_FAULTS": "write"}, check=False)
    assert done.returncode == 2


def test_the_campaign_covers_each_call_and_error():
    words = [each.split()[:3] for case in cases() for each in case.rules]
    assert {call for call, *_ in words} == {"open", "write", "fsync", "rename", "mkdir", "read"}
    assert {int(value) for _, action, value in words if action == "error"} == {
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS
    }  # fmt: skip
    assert len(cases()) > 50
    assert {case.launcher for case in cases()} == {"", "torchrun", "deepspeed"}
    assert set(STATUSES) == set(ExitStatus)
    assert {name for name in SHORT if name in {case.what for case in cases()}} == set(SHORT)


def test_without_a_compiler_the_campaign_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.faults.disks.find_compiler", lambda: None)
    with pytest.raises(UserError, match="a disk that fails needs a C compiler"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"status": None}, "it did not end"),
        ({"status": 1}, "its status is 1, not 75"),
        ({"output": GOOD.output + "\nTraceback (most recent call last):"}, "it prints a traceback"),
        ({"output": "metrics.jsonl\nthe disk is full"}, "no line names metrics.jsonl and is full"),
        ({"steps": 11}, "it ended after step 11"),
        (
            {"damaged": ("step_3: state.json is missing",)},
            "a complete checkpoint is damaged: step_3: state.json is missing",
        ),
        ({"beside": False}, "training waited for a save"),
        ({"strays": 1}, "1 processes stayed behind"),
        ({"again": 1}, "the same command ends with 1"),
        ({"lines": [*LINES, LINES[3]]}, "metrics.jsonl has a line twice"),
        ({"lines": LINES[1:]}, "1 line(s) of metrics.jsonl are missing"),
        (
            {"lines": [*LINES[:-1], ("train", 12, 0.0, 2.0)]},
            "its losses are not those of the undisturbed run: ('train', 12, 0.0, 2.0)",
        ),
    ],
)
def test_a_verdict_says_what_is_wrong(change, problem):
    assert verdict(CASE, dataclasses.replace(GOOD, **change), LINES) == problem


def test_a_verdict_allows_what_a_case_allows():
    loses = dataclasses.replace(CASE, loses=True)
    assert verdict(loses, dataclasses.replace(GOOD, lines=LINES[1:]), LINES) == ""
    refused = dataclasses.replace(CASE, statuses=(2,), trains=False)
    assert verdict(refused, dataclasses.replace(GOOD, status=2, steps=9), LINES) == ""
