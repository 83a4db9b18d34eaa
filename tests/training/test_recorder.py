"""The record of a run: a full disk causes a warning; it loses no line and ends no run."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from conf.load import load
from launch.estimate.counts import shape_of
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
    assert recorder.close({"status": "finished"})
    assert steps(recorder) == [0]
    assert recorder.folder.read_summary()["status"] == "finished"


def test_a_summary_that_cannot_be_written_is_reported(recorder, capsys):
    with full_disk():
        assert not recorder.close({"status": "finished"})
    assert "warning: the last metrics and the summary could not be written" in capsys.readouterr().out
    assert recorder.folder.read_summary() == {}


def test_other_ranks_are_silent(recorder, capsys):
    recorder.enabled = False
    recorder.event("started")
    recorder.samples(["text"])
    assert recorder.close({"status": "finished"})
    assert not (recorder.folder.path / "metrics.jsonl").exists()
    assert not (recorder.folder.path / "samples.txt").exists()
    assert capsys.readouterr().out == ""
