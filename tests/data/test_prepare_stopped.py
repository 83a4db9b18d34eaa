"""Preparation that is stopped: by a signal to the command or to a worker, at its start or in its middle."""

from __future__ import annotations

import re
import signal
import textwrap
from dataclasses import replace

import pytest

import data.folder
import data.groups
import data.pool
import data.prepare
from data.folder import folder_of
from data.prepare import prepare
from data.shards import INDEX
from tests.data.test_prepare import content, script

pytestmark = pytest.mark.usefixtures("small_shards")


def test_killed_and_resumed_is_the_same_as_uninterrupted(corpus, tmp_path, python, monkeypatch):
    config, tokenizer = corpus
    kill = """
        write, count = data.pool.write_group, []
        def write_and_die(*arguments):
            write(*arguments)
            count.append(1)
            if len(count) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        data.pool.write_group = write_and_die
    """
    process = python(script(corpus, kill))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    folder = folder_of(config, tokenizer)
    assert not (folder / INDEX).exists()
    assert len(list(folder.glob("group-*.json"))) == 4
    (folder / ".train-00005.bin.99.tmp").write_bytes(b"half")
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir() if not path.name.startswith(".")}
    # A shard that was damaged meanwhile is not trusted.
    with open(folder / "train-00001.bin", "r+b") as file:
        file.write(b"\xff")
    encoded = []
    encode = data.pool.encode_group

    def watch(folder, tokenizer, group):
        assert not list(folder.glob(".*tmp"))  # room is made first, it may be what the disk lacks
        encoded.append(group.number)
        return encode(folder, tokenizer, group)

    monkeypatch.setattr(data.pool, "encode_group", watch)
    monkeypatch.setattr(data.prepare, "run_in_subprocess", None)  # the tokenizer is not trained again
    assert prepare(config, tokenizer) == folder
    assert encoded[0] == 1
    assert encoded[1] == 4
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert {name for name in inodes if after[name] != inodes[name]} <= {
        "train-00001.bin", "train-00001.idx", "held_out-00001.bin", "held_out-00001.idx", "group-00001.json"
    }  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(data.groups, "MEGABYTE", 8 << 10)
    assert content(prepare(replace(config, prepared=str(tmp_path / "whole")), tokenizer)) == content(folder)


DIE_AFTER_TWO = """
    config.workers = 2
    count = []
    class ProgressReporter(data.progress.ProgressReporter):
        def update(self, fraction):
            if self.stage == "tokenizing":
                count.append(1)
                if len(count) == 2:
                    os.{call}
        def start(self, stage):
            self.stage = stage.split()[0]
    data.prepare.ProgressReporter = ProgressReporter
"""


def test_workers_end_with_a_killed_parent(corpus, python):
    process = python(script(corpus, DIE_AFTER_TWO.format(call="kill(os.getpid(), signal.SIGKILL)")))
    process.communicate(timeout=60)  # returns when the last worker has closed the pipe
    assert process.returncode == -signal.SIGKILL
    assert prepare(*corpus)


@pytest.mark.parametrize("whom", ["kill(os.getpid()", "killpg(os.getpgid(0)"], ids=["the process", "Ctrl-C"])
def test_an_interrupt_ends_cleanly_and_leaves_what_is_finished(corpus, python, whom):
    command = script(corpus, DIE_AFTER_TWO.format(call=f"{whom}, signal.SIGINT)")).splitlines()
    # A shell's background job, such as these tests may be, is born deaf to Ctrl-C.
    hears = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    command[-1] = f"from kernels.common.commands import run_command\n{hears}\nrun_command(lambda argv: {command[-1]})"
    process = python("\n".join(command))
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, "interrupted\n")
    folder = folder_of(*corpus)
    assert len(list(folder.glob("group-*.json"))) >= 2
    assert prepare(*corpus) == folder


def test_an_interrupt_does_not_wait_for_what_a_worker_is_doing(python):
    code = "import signal, time, data.pool; signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    process = python(code + "signal.alarm(2); data.pool.run_in_subprocess(time.sleep, 600)")
    _, complaint = process.communicate(timeout=60)
    assert complaint.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("with_signal", ["SIGKILL", "SIGINT"])
def test_a_worker_that_is_killed_is_told_in_a_sentence(corpus, python, with_signal):
    kill = f"""
        import contextlib, multiprocessing
        config.workers = 2
        class ProgressReporter(data.progress.ProgressReporter):
            def start(self, stage):
                self.stage = stage
            def update(self, fraction):
                for child in multiprocessing.active_children() if "tokenizing" in self.stage else []:
                    with contextlib.suppress(ProcessLookupError):  # the pool ends the others when one is gone
                        os.kill(child.pid, signal.{with_signal})
        data.prepare.ProgressReporter = ProgressReporter
        from kernels.common.errors import UserError
        try:
            data.prepare.prepare(config, tokenizer)
        except UserError as error:
            raise SystemExit(f"said: {{error}}")
    """
    process = python(script(corpus, kill))
    _, complaint = process.communicate(timeout=60)
    assert complaint.startswith("said: a worker process died")
    assert "lower data.workers" in complaint
    assert complaint.count("\n") == 1


def signal_workers_at_their_start(folder, name: str) -> None:
    """Write a module that Python imports as it starts, where the folder is on its path."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"if any('spawn_main' in argument for argument in sys.orig_argv): os.kill(os.getpid(), signal.{name})\n"
    )


def test_an_interrupt_that_meets_a_worker_at_its_start_prints_no_traceback(corpus, python, tmp_path):
    signal_workers_at_their_start(tmp_path, "SIGINT")
    environment = f"""
        os.environ["PYTHONPATH"] = {str(tmp_path)!r} + os.pathsep + os.environ["PYTHONPATH"]
        from kernels.common.errors import UserError
    """
    lines = script(corpus, environment).splitlines()
    lines[-1] = f"try: {lines[-1]}\nexcept UserError as error: raise SystemExit(f'said: {{error}}')"
    _, complaint = python("\n".join(lines)).communicate(timeout=60)
    assert re.fullmatch(r"said: a worker process died.*\n", complaint)


def test_a_worker_that_dies_before_it_reads_what_is_sent_ends_the_pool(python, tmp_path):
    """More than a pipe holds: up to Python 3.11.5 the pool waited forever."""
    signal_workers_at_their_start(tmp_path, "SIGKILL")
    code = f"""
        import os, data.pool
        from kernels.common.errors import UserError
        os.environ["PYTHONPATH"] = {str(tmp_path)!r} + os.pathsep + os.environ["PYTHONPATH"]
        try:
            data.pool.run_in_subprocess(len, "x" * (4 << 20))
        except UserError as error:
            raise SystemExit(f"said: {{error}}")
    """
    _, complaint = python(textwrap.dedent(code)).communicate(timeout=60)
    assert re.fullmatch(r"said: a worker process died.*\n", complaint)
