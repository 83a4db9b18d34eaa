"""The record of a run: a full disk causes a warning; it loses no line and ends no run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from conf.load import load
from conf.shape import shape_of
from tests.training.tiny import overrides
from training.console import Console
from training.recorder import RunRecorder
from training.runfolder import RunFolder


@pytest.fixture
def recorder(tmp_path):
    """The recorder of a run with a fake data set."""
    config = load(overrides(tmp_path, tmp_path / "runs", run="r", steps=4))
    folder = RunFolder(config)
    folder.claim(config)
    batch = SimpleNamespace(steps=4, tokens_per_step=256, tokens=1024)
    dataset = SimpleNamespace(held_out=SimpleNamespace(tokens=100), bytes_per_token=3.0, why_no_bits="")
    recorder = RunRecorder(config, batch, shape_of(config, 384), dataset, folder, Console(), enabled=True)
    recorder.open()
    yield recorder
    folder.close()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 10 bytes. Exit inside the test: pytest's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(recorder: RunRecorder) -> list[int]:
    return [json.loads(line)["step"] for line in (recorder.folder.path / "metrics.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, as one line."""
    return " ".join(capsys.readouterr().out.split())


def test_lines_wait_for_space_and_the_warning_comes_once(recorder, capsys):
    recorder.event("started")
    with full_disk():
        for recorder.step in (1, 2, 3):
            recorder.event("saved")
        recorder.samples(["a text that does not fit"])
    assert steps(recorder) == [0]
    recorder.step = 4
    recorder.event("saved")
    assert steps(recorder) == [0, 1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.count("warning: metrics.jsonl cannot be written") == 1
    assert out.count("warning: samples.txt could not be written") == 1


def test_lines_that_still_wait_are_written_at_the_end(recorder):
    with full_disk():
        recorder.event("started")
    assert steps(recorder) == []
    assert recorder.close({"status": "finished"}) == 0
    assert steps(recorder) == [0]
    assert recorder.folder.read_summary()["status"] == "finished"


def test_a_summary_that_cannot_be_written_is_reported(recorder, capsys):
    with full_disk():
        assert recorder.close({"status": "finished"}) == 1
    path = recorder.folder.path
    assert f"warning: the summary could not be written: {path / 'summary.json'}: File too large" in said(capsys)
    assert recorder.folder.read_summary() == {}


def test_lines_that_are_lost_are_counted_and_do_not_keep_the_summary_from_being_written(recorder, capsys, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder.event("started")
    monkeypatch.setattr(
        recorder.folder.metrics, "_file", SimpleNamespace(seek=full, write=full, truncate=full, close=int)
    )
    for recorder.step in (1, 2, 3):
        recorder.event("saved")
    capsys.readouterr()
    assert recorder.close({"status": "finished"}) == 75
    lost = f"{recorder.folder.path}: the disk is full; free some space; 3 line(s) of steps 1 to 3 are lost"
    assert said(capsys) == f"warning: the last metrics could not be written: {lost}"
    assert recorder.folder.read_summary()["status"] == "finished"
    recorder.folder.metrics._file = None


def test_metrics_that_cannot_be_synced_are_reported(recorder, capsys, monkeypatch):
    synced = os.fsync

    def broken(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(descriptor)

    recorder.event("started")
    monkeypatch.setattr(os, "fsync", broken)
    assert recorder.close({"status": "finished"}) == 75
    assert "metrics.jsonl: the disk reports an error; check the disk" in said(capsys)
    recorder.folder.close()  # raises nothing, and releases the lock


def test_other_ranks_are_silent(recorder, capsys):
    recorder.enabled = False
    recorder.event("started")
    recorder.samples(["text"])
    assert recorder.close({"status": "finished"}) == 0
    assert not (recorder.folder.path / "metrics.jsonl").exists()
    assert not (recorder.folder.path / "samples.txt").exists()
    assert capsys.readouterr().out == ""
