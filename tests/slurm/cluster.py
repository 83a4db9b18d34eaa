"""A SLURM of four virtual nodes on this machine: munge, slurmctld and a slurmd a node, over the loopback.

Real daemons and real queues; what is not real is that all nodes share this machine's cores, file system and memory. Needs
root and Debian's packages `slurm-wlm` and `munge`. `python -m tests.slurm.cluster` starts one to try things by hand.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES, CORES = 4, 4
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_PATIENCE = 300  # seconds until what is waited for is taken for hung

_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=20
MessageTimeout=20
KillWait=10
InactiveLimit=0
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool.%n
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cores} RealMemory=4096
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why no cluster can be started here, or "" if one can."""
    without = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if without:
        return f"SLURM is not installed ({', '.join(without)}): apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons are started by root here"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


class Cluster:
    """A cluster that lives until `stop`; `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons, and wait until every node is idle.

        Raises:
            RuntimeError: they are not, after minutes; with what their logs say.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged looks whether others could have changed it
        ports = free_ports(NODES + 1)
        values = {"host": socket.gethostname().split(".")[0], "folder": self.folder, "nodes": NODES, "cores": CORES}
        conf = _CONF.format(port=ports[0], first=ports[1], last=ports[-1], **values)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, **{f"{name}-file": self.folder / f"munged.{name}" for name in ("pid", "log", "seed")}}
        files["socket"] = self.folder / "munge.socket"
        self._daemon(["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())])
        until(lambda: (self.folder / "munge.socket").exists(), "munged to listen")
        self._daemon(["slurmctld", "-D", "-c"])
        for number in range(1, NODES + 1):
            (self.folder / f"spool.node{number}").mkdir(exist_ok=True)
            self._daemon(["slurmd", "-D", "-N", f"node{number}"])
        try:
            until(lambda: self._nodes() == ["idle"] * NODES, "idle nodes")
        except TimeoutError as error:
            logs = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in self.folder.glob("*.log"))
            raise RuntimeError(f"{error}\n{logs}") from error

    def _nodes(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def _daemon(self, words: list[str]) -> None:
        settings = {"env": os.environ | self.environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
        with open(self.folder / f"{words[0]}.out", "ab") as out:
            self._daemons.append(subprocess.Popen(words, stdout=out, stderr=out, **settings))

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command of SLURM; return what it printed."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: status {done.returncode}, {done.stderr}")
        return done.stdout

    def queued(self, number: str) -> bool:
        """Return whether a job or any task of an array is unfinished, or squeue did not answer."""
        words = ["squeue", "-h", "-j", number]
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        return bool(done.stdout or (done.returncode and "Invalid job id" not in done.stderr))

    def state(self, number: str) -> str:
        """Return how a job stands, as scontrol calls it."""
        told = self.run("scontrol", "-o", "show", "job", number, check=False)
        return next((word.partition("=")[2] for word in told.split() if word.startswith("JobState=")), "GONE")


def until(true, what: str, seconds: float = _PATIENCE) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it is not, after these seconds.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return as many ports in a row that nobody listens on."""
    begin = 21000 + os.getpid() % 800 * count  # another cluster of this machine looks elsewhere
    for first in range(begin, begin + 5000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()
    raise RuntimeError("no free ports in a row")


if __name__ == "__main__":
    argparse.ArgumentParser("python -m tests.slurm.cluster", description=__doc__).parse_args()
    if why := missing():
        sys.exit(why)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the daemons end too
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf PATH=$PATH:/usr/sbin   # in another shell")
        print("Ctrl-C ends the cluster")
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
