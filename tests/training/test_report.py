"""A full disk costs a warning, never a run, and no line."""

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
from training.report import Report
from training.runfolder import RunFolder


@pytest.fixture
def report(tmp_path):
    """A report of a run whose data set is made up."""
    config = load(overrides(tmp_path, tmp_path / "runs", run="r", steps=4))
    folder = RunFolder(config)
    folder.claim(config)
    batch = SimpleNamespace(steps=4, tokens_per_step=256, tokens=1024)
    dataset = SimpleNamespace(held_out=SimpleNamespace(tokens=100), held_out_bytes=300)
    report = Report(config, batch, shape_of(config, 384), dataset, folder, Console(), speaks=True)
    report.open()
    yield report
    folder.close()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 10 bytes. It ends inside the test: pytest's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(report: Report) -> list[int]:
    return [json.loads(line)["step"] for line in (report.folder.path / "metrics.jsonl").read_text().splitlines()]


def test_lines_wait_for_room_and_the_warning_comes_once(report, capsys):
    report.event("started")
    with full_disk():
        for report.step in (1, 2, 3):
            report.event("saved")
        report.samples(["a text that does not fit"])
    assert steps(report) == [0]
    report.step = 4
    report.event("saved")
    assert steps(report) == [0, 1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.count("warning: metrics.jsonl cannot be written") == 1
    assert out.count("warning: samples.txt could not be written") == 1


def test_lines_that_still_wait_are_written_at_the_end(report):
    with full_disk():
        report.event("started")
    assert steps(report) == []
    assert report.close({"status": "finished"})
    assert steps(report) == [0]
    assert report.folder.read_summary() == {"status": "finished"}


def test_an_end_that_cannot_be_written_is_told(report, capsys):
    with full_disk():
        assert not report.close({"status": "finished"})
    assert "warning: the end of the run could not be written" in capsys.readouterr().out
    assert report.folder.read_summary() == {}


def test_other_ranks_are_silent(report, capsys):
    report.speaks = False
    report.event("started")
    report.samples(["text"])
    assert report.close({"status": "finished"})
    assert not (report.folder.path / "metrics.jsonl").exists()
    assert not (report.folder.path / "samples.txt").exists()
    assert capsys.readouterr().out == ""
