"""A job of SLURM: its script, which a person can read, the code that it runs, and how it is submitted.

<folder>/slurm/job.sh      the script; `sbatch job.sh` submits it again
               code/       the code as it was when the job was submitted: later changes do not reach a job that goes on
               %j.log      what the job said
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conf.load import read_group
from conf.schema import ClusterConfig
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, say_why

ROOT = Path(__file__).resolve().parents[1]
_CODE = ("train.py", "ablation", "conf", "data", "kernels", "launch", "model", "training")
RUNS = ("RUNNING", "COMPLETING")
_OPEN = ("PENDING", "CONFIGURING", "SUSPENDED", *RUNS)  # states of a job that SLURM has not done with
_WAIT = 20  # seconds from the first rank that ends well to the last: they leave together


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs where.

    Args:
        name: of the job.
        folder: whose `slurm/` takes script, code and logs; absolute, and on a file system that all nodes see.
        command: what srun starts, in the shell's words; `$task` in it is the name of an array's task.
        doctor: what srun starts on each node before that.
        typed: the command that made this job, for the reader of the script.
        saved: shell patterns of what a task leaves to go on from. A job that ends without anything new is not started again.
        stopped: a shell command that tells whether a task that ended with status 0 has only stopped; None: it never has.
        hopeless: a shell command that tells whether starting a task again would not help; None: that is not known.
        nodes, ranks_per_node: how many; per_node: how many of the command srun starts on a node.
        tasks: the names of an array's tasks; none: it is one job.
        at_once: how many tasks of an array run at a time; 0: as many as there is room for.
    """

    name: str
    folder: Path
    command: str
    doctor: str
    typed: str
    saved: str
    stopped: str | None = None
    hopeless: str | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    per_node: int = 1
    tasks: tuple[str, ...] = ()
    at_once: int = 0
    script: str = "job.sh"

    @property
    def path(self) -> Path:
        """Where its script lies."""
        return self.folder / "slurm" / self.script


# ----------------------------------------------------------------------------------------------------------- the script


def read_cluster(words: list[str]) -> tuple[ClusterConfig | None, list[str]]:
    """Return the cluster that was named, None if none was, and the other words."""
    if not any(word.startswith(("cluster=", "cluster.")) for word in words):
        return None, words
    return read_group("cluster", ClusterConfig, words, "cluster")


def check(cluster: ClusterConfig, ranks_per_node: int) -> None:
    """Refuse what a cluster does not have.

    Raises:
        UserError: more ranks a node than it has GPUs or cores; a container without an image, or of an unknown kind.
    """
    has, what = (cluster.gpus_per_node, "GPUs") if cluster.gpus_per_node else (cluster.cpus_per_node, "cores")
    if ranks_per_node > has:
        raise UserError(f"ranks_per_node={ranks_per_node}, but a node of {cluster.name} has {has} {what}")
    for name, value, choices in (
        ("tasks", cluster.tasks, ("gpu", "node")),
        ("container", cluster.container, ("none", "apptainer", "pyxis")),
        ("gpu_request", cluster.gpu_request, ("--gpus-per-node", "--gres", "none")),
    ):
        if value not in choices:
            raise UserError(f"cluster.{name}={value} must be one of {', '.join(choices)}")
    if cluster.container != "none" and not cluster.image:
        raise UserError(f"cluster.container={cluster.container} needs cluster.image=IMAGE")


def render(job: Job, cluster: ClusterConfig) -> str:
    """Return the script of a job."""
    seconds = cluster.signal_seconds
    cpus = "--cpus-per-task=$SLURM_CPUS_PER_TASK"  # srun does not inherit it
    lines = [
        "#!/bin/bash",
        f"# {job.name}: {_many(job.nodes, 'node')} with {_many(job.ranks_per_node, 'rank')} each"
        + (f", an array of {_many(len(job.tasks), 'task')}" if job.tasks else ""),
        f"# written by  {job.typed}",
        f"# with the code of {job.folder / 'slurm' / 'code'} ({_version()})",
        f"# submit it again: sbatch {'--array=TASK ' if job.tasks else ''}{shlex.quote(str(job.path))}",
        *(f"#SBATCH {option}" for option in _options(job, cluster)),
        "",
        *(f"module load {module}" for module in cluster.modules),
        *cluster.setup,
        f"export OMP_NUM_THREADS={_cores(job, cluster)}",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on a node have two",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in cluster.environment.items()),
        "",
        "# What stands in the way of a run on these nodes, if anything does.",
        _srun(["--nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES --ntasks-per-node=1", cpus], job.doctor, job, cluster),
        "",
        *_names(job),
        "# What a task leaves to go on from. One that ends without anything new is not started again, unless it was preempted.",
        f"saved() {{ ls -d {job.saved} 2>/dev/null; }}",
        "before=$(saved)",
        "",
        f"# {seconds} s before its time is up SLURM sends USR1 to this script, which passes it on: all ranks then stop after",
        "# the same step and save. Before a preemption SLURM sends TERM, to this script, to the ranks, or to both.",
        "trap 'signalled=yes; kill -USR1 \"$step\"' USR1 TERM",
        # One rank that fails ends the others, and so does one that ends and leaves others behind (of a node that is lost).
        _srun(["--kill-on-bad-exit=1", f"--wait={_WAIT}", cpus], job.command, job, cluster) + " &",
        "step=$!",
        'wait "$step"; status=$?',
        'while [ -n "$signalled" ]; do signalled=; wait "$step"; status=$?; done',
        "",
        f"if [ $status -eq 0 ]{f' && ! {job.stopped}' if job.stopped else ''}; then exit 0; fi",
        *([f"if {job.hopeless}; then exit 1; fi"] if job.hopeless else []),
        'told=$(scontrol -o show job "$SLURM_JOB_ID")',
        "if [[ $told != *JobState=RUNNING* ]]; then exit 1; fi  # it was cancelled",
        'if [ "$(saved)" = "$before" ] && [[ $told != *PreemptTime=2* ]]; then',
        '    echo "job $SLURM_JOB_ID ended with status $status and saved nothing new: it is not started again" >&2',
        "    exit $((status > 0 ? status : 1))",
        "fi",
        'echo "job $SLURM_JOB_ID goes on from what it saved" >&2',
        'scontrol requeue "$SLURM_JOB_ID" ||',
        f'    sbatch --dependency=afterany:"$SLURM_JOB_ID" {"--array=$SLURM_ARRAY_TASK_ID " if job.tasks else ""}'
        f"{shlex.quote(str(job.path))}",
    ]
    return "\n".join(lines) + "\n"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _names(job: Job) -> list[str]:
    """Return the lines that say which task of an array this is."""
    if not job.tasks:
        return []
    names = [f"    {shlex.quote(name)}  # {number}" for number, name in enumerate(job.tasks)]
    return ["# What the tasks of this array are called, by their numbers.", "tasks=(", *names, ")",
            "task=${tasks[$SLURM_ARRAY_TASK_ID]}", ""]  # fmt: skip


def _cores(job: Job, cluster: ClusterConfig) -> int:
    """Return how many cores a rank has: its share of those of the GPUs that the job takes, or of the node's."""
    return max(1, cluster.cpus_per_node // (cluster.gpus_per_node or job.ranks_per_node))


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the options of sbatch, one a line of the script."""
    whole = job.ranks_per_node == cluster.gpus_per_node or not cluster.gpus_per_node
    options = {
        "--job-name": job.name,
        "--output": job.folder / "slurm" / ("%A_%a.log" if job.tasks else "%j.log"),
        "--comment": job.folder,  # by which `queued` finds it
        "--chdir": Path.cwd(),
        "--nodes": job.nodes,
        "--ntasks-per-node": job.per_node,
        "--cpus-per-task": _cores(job, cluster) * job.ranks_per_node // job.per_node,
        "--time": cluster.time,
        "--signal": f"B:USR1@{cluster.signal_seconds}",
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--qos": cluster.qos,
        "--constraint": cluster.constraint,
        "--mem": cluster.memory if whole or cluster.memory != "0" else None,  # all of a node is not for a part of it
    }
    if cluster.gpus_per_node and cluster.gpu_request != "none":
        options[cluster.gpu_request] = f"{'gpu:' if cluster.gpu_request == '--gres' else ''}{job.ranks_per_node}"
    if job.tasks:
        options["--array"] = f"0-{len(job.tasks) - 1}{f'%{job.at_once}' if job.at_once else ''}"
    written = [f"{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*written, "--requeue", "--open-mode=append", *map(str, cluster.sbatch)]


def _srun(options: list[str], command: str, job: Job, cluster: ClusterConfig) -> str:
    """Return the line that starts a command on the nodes of a job, in its container."""
    words = ["srun", *options]
    if cluster.container != "none":
        mounts = [*dict.fromkeys(f"{path}:{path}" for path in (Path.cwd(), job.folder)), *map(str, cluster.mounts)]
        where, image = shlex.quote(str(Path.cwd())), shlex.quote(str(cluster.image))
        mounted = shlex.quote(",".join(mounts))
        if cluster.container == "pyxis":
            words += [f"--container-image={image}", f"--container-mounts={mounted}", f"--container-workdir={where}"]
        else:
            gpus = "--nv " if cluster.gpus_per_node else ""
            command = f"apptainer exec {gpus}--bind {mounted} --pwd {where} {image} {command}"
    return " ".join([*words, "\\\n   ", command])


def doctor_of(cluster: ClusterConfig, code: Path, words: list[str]) -> str:
    """Return what looks at a node before a job trains on it."""
    module = shlex.quote(str(code / "launch" / "run_module.py"))
    return " ".join([python_of(cluster), "-u", module, "launch.doctor quick=true", *map(shlex.quote, words)])


def command_of(cluster: ClusterConfig, nodes: int, ranks_per_node: int, code: Path, words: list[str]) -> str:
    """Return what `srun` starts to train: train.py itself, or torchrun with the ranks of a node."""
    launcher = [python_of(cluster), "-u"]
    if cluster.tasks == "node":
        # Without SIGUSR1 among these torchrun dies of it and leaves its ranks behind.
        launcher += [
            "-m torch.distributed.run",
            f"--nnodes={nodes} --nproc-per-node={ranks_per_node} --node-rank=$SLURM_NODEID",
            "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        ]
    command = " ".join([*launcher, shlex.quote(str(code / "train.py")), *map(shlex.quote, words)])
    # $SLURM_NODEID is of the task: it is read there, not in the script.
    return f"bash -c {shlex.quote(f'exec {command}')}" if cluster.tasks == "node" else command


def python_of(cluster: ClusterConfig) -> str:
    """Return the interpreter of a job: the one that submits it, unless the cluster says another, or a container has its own."""
    return cluster.python or (sys.executable if cluster.container == "none" else "python")


def _version() -> str:
    """Return which commit the code is, for the reader of a script."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return f"commit {git('rev-parse', '--short=12', 'HEAD')}{', changed' if git('status', '--porcelain') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


# ---------------------------------------------------------------------------------------------------------- submission


def submit(jobs: list[Job], cluster: ClusterConfig) -> list[str]:
    """Write the scripts of jobs of one folder beside their code, and submit them, each to begin when the one before has ended.

    Returns:
        Their numbers.

    Raises:
        UserError: there is no sbatch, or SLURM does not take a job; the scripts stay.
    """
    folder = jobs[0].folder / "slurm"
    with say_why("write the job to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _keep_code(folder / "code")
        for job in jobs:
            with atomic_write(job.path) as file:
                file.write(render(job, cluster))
            job.path.chmod(0o755)
    ids: list[str] = []
    for job in jobs:
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(_sbatch([*after, str(job.path)]))
    return ids


def _sbatch(words: list[str]) -> str:
    try:
        told = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        print(Path(words[-1]).read_text(encoding="utf-8"), end="")
        raise UserError(
            f"there is no sbatch here: the script above is {words[-1]}; on a node of the cluster that sees this folder, "
            f"type  sbatch {words[-1]}"
        ) from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.replace("sbatch: error:", "").split())
        raise UserError(
            f"SLURM did not take the job: {said.rstrip('.')}. Change what it asks for with cluster.KEY=VALUE (partition, "
            f"account, time, memory, nodes=N) or in {words[-1]}"
        ) from error
    return told.stdout.strip().split(";")[0]


def _keep_code(target: Path) -> None:
    """Copy the code to a folder, in place of what an earlier job kept there."""
    partial = target.with_name(f".code.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, partial / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            partial.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, partial / name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


@dataclasses.dataclass(frozen=True)
class Queued:
    """A job that SLURM has not done with, or a task of an array."""

    number: str
    state: str  # RUNS, or another one of a job that waits
    name: str
    task: int | None


def queued(folder: Path) -> list[Queued]:
    """Ask SLURM what waits or runs of a folder's jobs, whoever submitted them; nothing where there is no SLURM."""
    asked = ["squeue", "--noheader", "--array", f"--states={','.join(_OPEN)}", "--format=%i|%T|%j|%K|%k"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    found = []
    for line in told.splitlines():
        number, state, name, task, whose = line.split("|", maxsplit=4)
        if whose == str(folder.resolve()):
            found.append(Queued(number, state, name, int(task) if task.isdigit() else None))
    return found


def refuse_queued(folder: Path) -> None:
    """Refuse a folder whose jobs are still in SLURM's queue.

    Raises:
        UserError: which they are.
    """
    if waiting := queued(folder):
        first, more = waiting[0], len(waiting) - 1
        raise UserError(
            f"{folder} has been submitted already: job {first.number} is {first.state.lower()}"
            f"{f', and {more} more' if more else ''}; wait for it, or type  scancel {first.number.split('_')[0]}"
        )
