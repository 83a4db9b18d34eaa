"""A cluster of four virtual nodes that the tests of this folder share, and jobs on it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, missing, until
from tests.training.tiny import PATIENCE, Result, command

SETTINGS = [
    "cluster=cpu",
    "cluster.environment={DS_ACCELERATOR: cpu}",
    "cluster.cpus_per_node=2",
]


class Slurm(Cluster):
    """The cluster, and what the tests do with it."""

    def launch(self, *words: str) -> Result:
        """Run `launch.slurm`."""
        return command(sys.executable, "-m", "launch.slurm", *SETTINGS, *words, **self.environment)

    def submit(self, *words: str) -> str:
        """Run `launch.slurm` and return the number of the job."""
        result = self.launch(*words)
        assert result.status == 0, result.err
        return re.search(r"^job (\d+) is submitted", result.out, re.MULTILINE)[1]

    def wait(self, number: str, *wanted: str) -> None:
        """Wait until a job is in one of these states, and fail when it ends in another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")

        def there() -> bool:
            state = self.state(number)
            assert state in wanted or state not in ended, f"job {number} is {state}, not {wanted}"
            return state in wanted

        until(there, f"job {number} to be {' or '.join(wanted)}", PATIENCE)

    def wait_for_step(self, run: Path, number: str, step: int) -> None:
        """Wait until a job has told of a step, and fail when it ends before."""

        def told() -> bool:
            said = log(run, number)
            assert self.state(number) in ("PENDING", "RUNNING"), said
            return bool(re.search(rf"^0: step +{step}/", said, re.MULTILINE))

        until(told, f"step {step} of {run.name}", PATIENCE)

    def go_on(self, number: str) -> None:
        """Let a requeued job start at once: SLURM makes it wait for two minutes."""
        until(
            lambda: "BeginTime" in self.run("squeue", "-h", "-o", "%r", "-j", number, check=False),
            f"job {number} to wait for its time",
        )
        self.run(
            "scontrol", "update", f"jobid={number}", "StartTime=now+3seconds"
        )  # the old job's credential counts for its second

    def ranks(self, run: Path) -> list[psutil.Process]:
        """Return the processes that train in a run's folder."""
        code = str(run / "slurm" / "code" / "train.py")
        return [
            p
            for p in psutil.process_iter(["cmdline", "name"])
            if p.info["name"] != "srun" and code in (p.info["cmdline"] or [])
        ]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    cluster = Slurm(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def log(run: Path, number: str) -> str:
    """Return what a job said."""
    path = run / "slurm" / f"{number}.log"
    return path.read_text() if path.exists() else ""
