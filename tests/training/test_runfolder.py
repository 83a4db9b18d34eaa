"""The files of a run: metrics without duplicates, a summary that is never partial, and a lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import time

import pytest

from conf.load import from_yaml, load
from conf.validate import total_steps
from kernels.common.errors import TryAgain, UserError
from kernels.common.json_files import read_document_losses
from tests.training.tiny import overrides
from training import metrics_file, runfolder
from training.runfolder import RunFolder


@pytest.fixture
def config(tmp_path):
    """A configuration whose runs are in tmp_path."""
    return load(overrides(tmp_path, tmp_path / "runs", run="r"))


@pytest.fixture
def folder(config):
    """The run folder, claimed."""
    folder = RunFolder(config)
    folder.claim(config)
    yield folder
    folder.close()


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def test_rewinding_deletes_the_losses_of_documents_that_will_be_measured_again(folder):
    losses = {"held_out": "a", "nats": [7.0], "tokens": [2]}
    for step, repeats, kept in ((4, False, True), (5, False, True), (3, False, False), (4, True, False)):
        folder.write_document_losses(4, losses)
        folder.rewind(step, repeats_evaluation=repeats)
        assert (read_document_losses(folder.path) is not None) == kept, (step, repeats)


def test_rewinding_deletes_later_lines_and_a_partial_one(folder):
    for step in (0, 1, 2, 2, 3, 4):
        folder.metrics.append({"kind": "train", "step": step})
    folder.close()
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    folder.rewind(2)
    assert steps(folder) == [0, 1, 2, 2]
    folder.metrics.append({"kind": "train", "step": 3})
    assert steps(folder) == [0, 1, 2, 2, 3]


def test_the_evaluation_of_the_last_step_is_found_or_deleted_to_be_repeated(folder):
    folder.metrics.append({"kind": "eval", "step": 2, "held_out_tokens": 64, "loss": 3.5})
    folder.metrics.append({"kind": "train", "step": 4, "loss": 3.0})
    folder.metrics.append({"kind": "eval", "step": 4, "held_out_tokens": 64, "loss": 3.25})
    assert folder.metrics.recorded_loss(4, 64) == 3.25
    assert folder.metrics.recorded_loss(4, 128) is None
    folder.rewind(4)
    assert steps(folder) == [2, 4, 4]
    folder.rewind(4, repeats_evaluation=True)
    assert steps(folder) == [2, 4]


def test_a_line_is_in_the_file_when_append_returns(folder):
    folder.metrics.append({"kind": "train", "step": 1})
    assert steps(folder) == [1]


def test_a_line_that_the_disk_refuses_is_written_later_and_complete(folder):
    record = {"kind": "train", "step": 1, "text": "x" * 100}
    folder.metrics.append(record)
    path = folder.path / "metrics.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the second line fits only in part
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                folder.metrics.append(record | {"step": step})
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder.metrics.append(record | {"step": 4})
    assert steps(folder) == [1, 2, 3, 4]


def test_metrics_that_the_disk_does_not_give_are_named_and_leave_the_summary(folder, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder.metrics.append({"kind": "train", "step": 1})
    folder.write_summary({"status": "stopped"})
    monkeypatch.setattr(metrics_file, "read_metrics_file", broken)
    with pytest.raises(TryAgain, match=r"cannot read .*metrics\.jsonl: the disk reports an error"):
        folder.rewind(1)
    assert folder.read_summary() == {"status": "stopped"}


def test_a_resumed_run_has_no_summary(folder):
    folder.write_summary({"status": "stopped"})
    folder.rewind(0)
    assert folder.read_summary() == {}


def test_config_yaml_is_the_complete_configuration(folder, config):
    assert from_yaml(folder.path / "config.yaml") == config


def test_the_lock_is_released(folder, config, monkeypatch):
    monkeypatch.setattr(runfolder, "LOCK_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder(config).claim(config)
    folder.close()
    again = RunFolder(config)
    again.claim(config)
    again.close()


def test_a_killed_process_holds_no_lock(folder, config):
    folder.close()
    hold = "from filelock import FileLock; lock = FileLock('.lock'); lock.acquire(); print('held', flush=True); input()"
    arguments = [sys.executable, "-c", hold]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, cwd=folder.path, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training in"):
            RunFolder(config).claim(config)
        process.kill()
    run = RunFolder(config)
    run.claim(config)
    run.close()


def test_a_file_system_without_locks_is_refused(folder, config, monkeypatch):
    folder.close()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        UserError, match=r"cannot lock .*/\.lock \(No locks available\): set runs to a folder on another file system"
    ):
        RunFolder(config).claim(config)


def test_checking_whether_a_run_is_alive_stops_none_from_starting(folder, config, monkeypatch):
    folder.close()
    check = open(folder.path / ".lock")
    fcntl.flock(check, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: check.close())  # the check ends while the run waits
    run = RunFolder(config)
    run.claim(config)
    run.close()
    assert check.closed


def test_a_run_resumes_only_with_the_same_settings(folder, config):
    folder.metrics.append({"kind": "event", "step": 0})
    folder.close()
    config.optim.lr = 0.5
    with pytest.raises(UserError, match=r"other settings \(optim.lr: 0.01 -> 0.5\)"):
        RunFolder(config).claim(config)
    config.optim.lr = 0.01
    config.steps = 99  # where a run stops does not change what it learns
    again = RunFolder(config)
    again.claim(config)
    again.close()
    assert from_yaml(folder.path / "config.yaml").steps == 99


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        ({"steps": 8}, "has trained 10 of 12 steps, so it cannot end after 8: set steps to more than 10"),
        (
            {"steps": 10},
            "has trained 10 of 12 steps, so it cannot end after 10",
        ),  # at the learning rate of step 10 of 12
        ({"steps": None, "tokens": 8 * 8 * 32}, "has trained 10 of 12 steps, so it cannot end after 8"),
    ],
)
def test_a_run_cannot_end_before_its_newest_checkpoint(folder, config, length, sentence):
    folder.metrics.append({"kind": "event", "step": 0})
    folder.close()
    for key, value in length.items():
        setattr(config, key, value)
    again = RunFolder(config)
    again.claim(config)
    assert again.previous_steps == 12
    with pytest.raises(UserError, match=sentence):
        again.refuse_fewer_steps(total_steps(config), 10)
    again.discard()
    again.close()
    assert from_yaml(folder.path / "config.yaml").steps == 12  # the record of the run is unchanged
    again.refuse_fewer_steps(11, 10)


@pytest.mark.parametrize("beside", [False, True])
def test_a_session_without_a_step_leaves_none_of_the_folders_that_it_made(config, tmp_path, beside):
    config.runs = str(tmp_path / "a" / "runs")
    if beside:
        (tmp_path / "a").mkdir()
    folder = RunFolder(config)
    folder.claim(config)
    folder.discard()
    folder.close()
    assert list(tmp_path.rglob("*")) == ([tmp_path / "a"] if beside else [])


def test_another_run_keeps_the_folder_that_both_are_in(config, tmp_path):
    config.runs = str(tmp_path / "runs")
    folder = RunFolder(config)
    folder.claim(config)
    (tmp_path / "runs" / "other").mkdir()
    folder.discard()
    folder.close()
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs" / "other"]


def test_a_run_that_finished_cannot_become_shorter(folder, config):
    folder.metrics.append({"kind": "event", "step": 0})
    folder.close()
    again = RunFolder(config)
    again.claim(config)
    again.close()
    again.refuse_fewer_steps(12, 12)  # the same length is no change
    with pytest.raises(
        UserError, match="has finished its 12 steps, so it cannot end after 6: set steps to more than 12"
    ):
        again.refuse_fewer_steps(6, 12)


def test_a_summary_that_cannot_be_written_leaves_the_previous_one(folder, monkeypatch):
    folder.write_summary({"status": "stopped"})
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.write_summary({"status": "finished"})
    assert folder.read_summary() == {"status": "stopped"}
    assert not list(folder.path.glob(".summary*"))


def test_no_summary_reads_as_empty(folder):
    assert folder.read_summary() == {}


def test_the_output_of_libraries_goes_to_a_file(folder, capfd):
    with folder.quiet():
        os.write(1, b"from a library\n")
        subprocess.run(["echo", "from a process"], check=True)
    os.write(1, b"afterwards\n")
    assert capfd.readouterr().out == "afterwards\n"
    log = (folder.path / "deepspeed.log").read_text()
    assert "from a library" in log
    assert "from a process" in log
