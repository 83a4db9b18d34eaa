"""A launcher passes signals on to its children and waits for them; no other process of the environment is changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from conf.cluster_schema import ClusterConfig
from launch.calm_launchers import LAUNCHERS, pth_line
from launch.job_script import command_of
from launch.local import launcher
from tests.training.tiny import ROOT, environment

# A rank that says when it is ready and which signals arrive, and ends with status 5 after the second.
RANK = """
import os, signal, sys
arrived = []
def tell(number, _):
    os.write(1, (signal.Signals(number).name + "\\n").encode())
    arrived.append(number)
    if len(arrived) == 2:
        sys.exit(5)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, tell)
os.write(1, b"ready\\n")
while True:
    signal.pause()  # a signal may come before it
"""
# Handles signals itself, as `deepspeed.launcher.launch` and torchrun do.
LAUNCHER = f"""
import signal, site, subprocess, sys
for _ in range(2):  # as Python does in a virtual environment
    site.addsitedir(sys.argv[-1])
def end(number, _):
    raise RuntimeError("the launcher's own answer")
signal.signal(signal.SIGINT, end)
sys.exit(subprocess.run([sys.executable, "-c", {RANK!r}]).returncode)
"""


def start(folder, name: str) -> subprocess.Popen[str]:
    (folder / "formula_ffn_launchers.pth").write_text(pth_line())
    (folder / name).write_text(LAUNCHER)
    words = [sys.executable, str(folder / name), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=environment(), start_new_session=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "torchrun"])
def test_a_launcher_passes_signals_on_and_ends_as_its_ranks_do(tmp_path, name):
    process = start(tmp_path, name)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    out, err = process.communicate()
    assert (process.returncode, out, err) == (5, "", "")


def test_the_third_signal_is_the_launchers_own(tmp_path):
    code = f"""
import itertools, signal, sys, time
time.monotonic = itertools.count(step=2).__next__
sys.path.insert(0, {str(ROOT)!r})
from launch import calm_launchers
for _ in range(2):
    calm_launchers._calm("torchrun")
signal.signal(signal.SIGINT, lambda *_: sys.exit(9))
for number in range(3):
    print(number, flush=True)
    signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (9, "0\n1\n2\n", "")


def test_programs_that_are_no_launcher_keep_their_handlers(tmp_path):
    process = start(tmp_path, "train.py")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert "the launcher's own answer" in err
    assert process.returncode == 1


def test_the_runner_of_deepspeed_keeps_the_handler_that_ends_other_nodes(tmp_path):
    process = start(tmp_path, "deepspeed")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert "the launcher's own answer" in err
    assert LAUNCHERS["deepspeed"]


@pytest.mark.parametrize(
    ("name", "level"),
    [("deepspeed", "error"), ("deepspeed.launcher.launch", "error"), ("./deepspeed", None), ("torchrun", None)],
)
def test_deepspeed_is_quiet_unless_it_is_asked(tmp_path, name, level):
    """It reads its hook twice, and the last --log_level counts. A script elsewhere of the same name is not DeepSpeed's."""
    (tmp_path / "formula_ffn_launchers.pth").write_text(pth_line())
    program = f"""
import logging, site, sys
for _ in range(2):
    site.addsitedir({str(tmp_path)!r})
logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU")
logging.getLogger("DeepSpeed").warning("something else")
print(sys.argv[1:])
"""
    (tmp_path / name).write_text(program)
    words = ["--log_level=info", "train.py", "steps=3"]
    done = subprocess.run(
        [sys.executable, name, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == str([f"--log_level={level}", *words] if level else words)
    assert lines[:-1] == ["something else"] if level else len(lines) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("deepspeed", "--num_gpus", "2"), ("torchrun", "--standalone", "--nproc-per-node=2")]
)
def test_the_installed_launchers_end_calmly(tmp_path, launcher):
    """Ctrl-C reaches all processes of a terminal at once; they are in one group here too."""
    name, *options = launcher
    (tmp_path / "formula_ffn_launchers.pth").write_text(pth_line())
    program = (
        "from deepspeed.launcher.runner import main"
        if name == "deepspeed"
        else "from torch.distributed.run import main"
    )
    hook = f"import site; site.addsitedir({str(tmp_path)!r})"
    (tmp_path / name).write_text(f"{hook}\n{program}\nmain()\n")
    (tmp_path / "sitecustomize.py").write_text(hook)  # for the process between `deepspeed` and the ranks
    # It ends at the first signal. Those that follow, from its launchers, must not find it without a handler while Python ends.
    once = "    signal.signal(number, signal.SIG_IGN)\n    sys.exit(0)"
    rank = RANK.replace("    if len(arrived) == 2:\n        sys.exit(5)", once)
    assert once in rank
    (tmp_path / "rank.py").write_text(rank)
    words = [sys.executable, str(tmp_path / name), *options, str(tmp_path / "rank.py")]
    variables = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", TORCH_CPP_LOG_LEVEL="ERROR")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=variables, start_new_session=True, **pipes)
    for _ in range(2):
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.count("SIGINT") >= 2  # one of each rank at least; two lines may run together
    assert "Traceback" not in out


FAILS = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == 0:
    time.sleep(600)  # until torchrun ends it
print("error: rank 1 says why", file=sys.stderr)
{how}
"""


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("os._exit(75)", 75, "error: rank 1 says why\n"),
        ("os.kill(os.getpid(), 9)", 137, "error: rank 1 says why\nerror: rank 1 was killed by SIGKILL\n"),
    ],
)
def test_torchrun_ends_with_the_status_of_the_rank_that_failed(tmp_path, how, status, told):
    (tmp_path / "ranks.py").write_text(FAILS.format(how=how))
    # Not by the name of a launcher: those of this environment have been set up already.
    (tmp_path / "start.py").write_text(
        "from launch import calm_launchers\ncalm_launchers.quieten_torchrun()\n"
        "from torch.distributed.run import main\nmain()\n"
    )
    words = [sys.executable, tmp_path / "start.py", "--standalone", "--nproc-per-node=2", tmp_path / "ranks.py"]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, told)


def test_where_nothing_is_installed_the_launcher_of_jobs_waits_for_its_ranks_too(tmp_path):
    """By itself torchrun would kill this rank, which goes on after the first signal, half a minute later."""
    (tmp_path / "rank.py").write_text(RANK)
    words = [
        sys.executable,
        ROOT / "launch" / "torchrun.py",
        "--standalone",
        "--nproc-per-node=1",
        tmp_path / "rank.py",
    ]
    variables = environment(TORCH_CPP_LOG_LEVEL="ERROR")
    process = subprocess.Popen(words, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for said in ("ready\n", "SIGUSR1\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate()
    assert (process.returncode, out) == (5, "SIGUSR1\n")
    command = command_of(ClusterConfig(tasks="node"), 1, 1, ROOT, [])
    assert f"{sys.executable} -u {words[1]} --nnodes=1 " in command
    assert launcher(2)[:2] == [sys.executable, str(words[1])]
