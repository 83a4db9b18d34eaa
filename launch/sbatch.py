"""SLURM jobs: write a readable job script and a copy of the code, and submit them.

<folder>/slurm/job.sh      the script; `sbatch job.sh` submits it again
               code/       a snapshot of the code at submission: later changes do not affect a job that is requeued
               %j.log      the output of the job
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from conf.load import read_group
from conf.schema import ClusterConfig
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from launch.ranks import without_launcher

ROOT = Path(__file__).resolve().parents[1]
_CODE = ("train.py", "ablation", "conf", "data", "kernels", "launch", "model", "training")
RUNS = ("RUNNING", "COMPLETING")
_UNFINISHED = ("PENDING", "CONFIGURING", "SUSPENDED", *RUNS)  # states of a job in the queue
_CLIENT_SETTINGS = (
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_JWT",
    "SLURM_CLUSTERS",
)  # of SLURM's commands, set by users
_LEFT_BY_SHELL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_WAIT = 20  # seconds between the first rank that exits with status 0 and the last


@dataclasses.dataclass(frozen=True)
class Job:
    """A job: what it runs, and on how many nodes.

    Args:
        name: of the job.
        folder: whose `slurm/` takes script, code and logs; absolute, on a file system shared by all nodes.
        command: shell command for srun to start; `$task` in it is the name of an array task.
        doctor: shell command for srun to start on each node first.
        typed: the command that created this job, quoted in the script.
        saved: shell patterns of the checkpoints that a task resumes from. A job that ends without a new one is not requeued.
        stopped: shell command that succeeds if a task with status 0 has only stopped early; None: it never does.
        hopeless: shell command that succeeds if requeueing a task would not help; None: unknown.
        nodes, ranks_per_node: size of the job.
        per_node: srun tasks per node.
        tasks: names of the array tasks; empty: a single job.
        at_once: array tasks that run at a time; 0: no limit.
        script: file name of the script.
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
        """The path of its script."""
        return self.folder / "slurm" / self.script


# ----------------------------------------------------------------------------------------------------------- the script


def read_cluster(arguments: list[str]) -> tuple[ClusterConfig | None, list[str]]:
    """Return the cluster that the arguments name, None if there is none, and all other arguments."""
    if not any(argument.startswith(("cluster=", "cluster.")) for argument in arguments):
        return None, arguments
    return read_group("cluster", ClusterConfig, arguments, "cluster")


def check(cluster: ClusterConfig, ranks_per_node: int) -> None:
    """Refuse settings that a cluster cannot satisfy.

    Raises:
        UserError: more ranks per node than GPUs or cores; a container without an image, or of an unknown kind.
    """
    available, unit = (cluster.gpus_per_node, "GPUs") if cluster.gpus_per_node else (cluster.cpus_per_node, "cores")
    if ranks_per_node > available:
        raise UserError(f"ranks_per_node={ranks_per_node}, but a node of {cluster.name} has {available} {unit}")
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
    """Return the job script."""
    seconds = cluster.signal_seconds
    cpus = "--cpus-per-task=$SLURM_CPUS_PER_TASK"  # srun does not inherit it
    lines = [
        "#!/bin/bash",
        f"# {job.name}: {_count(job.nodes, 'node')} with {_count(job.ranks_per_node, 'rank')} each"
        + (f", an array of {_count(len(job.tasks), 'task')}" if job.tasks else ""),
        f"# written by  {job.typed}",
        f"# with the code of {job.folder / 'slurm' / 'code'} ({_version()})",
        f"# submit it again: sbatch {'--array=TASK ' if job.tasks else ''}{shlex.quote(str(job.path))}",
        *(f"#SBATCH {option}" for option in _options(job, cluster)),
        "",
        "# What the shell that submitted this job may have left behind.",
        f"unset {' '.join(_LEFT_BY_SHELL)} ${{!SLURM_STEP_@}} ${{!SLURM_CPU_BIND@}} ${{!TORCHELASTIC_@}} ${{!OMPI_COMM_@}}",
        *(f"module load {module}" for module in cluster.modules),
        *cluster.setup,
        f"export OMP_NUM_THREADS={_cores(job, cluster)}",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # distinct for jobs that share a node",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in cluster.environment.items()),
        "",
        "# Check the nodes for problems first.",
        _srun(["--nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES --ntasks-per-node=1", cpus], job.doctor, job, cluster),
        "",
        *_names(job),
        "# The checkpoints that a task resumes from. One that ends without a new one is not requeued, unless it was preempted.",
        f"saved() {{ ls -d {job.saved} 2>/dev/null; }}",
        "before=$(saved)",
        "",
        f"# {seconds} s before the time limit SLURM sends USR1 to this script, which forwards it: all ranks then stop after",
        "# the same step and save. Before a preemption SLURM sends TERM to this script, to the ranks, or to both.",
        "trap 'signalled=yes; kill -USR1 \"$step\"' USR1 TERM",
        # A failed rank ends the others, and so does one that exits while others remain (on a lost node).
        _srun(
            [f"--ntasks={job.nodes * job.per_node}", "--kill-on-bad-exit=1", f"--wait={_WAIT}", cpus],
            job.command,
            job,
            cluster,
        )
        + " &",
        "step=$!",
        'wait "$step"; status=$?',
        'while [ -n "$signalled" ]; do signalled=; wait "$step"; status=$?; done',
        "",
        f"if [ $status -eq 0 ]{f' && ! {job.stopped}' if job.stopped else ''}; then exit 0; fi",
        *([f"if {job.hopeless}; then exit 1; fi"] if job.hopeless else []),
        'state=$(scontrol -o show job "$SLURM_JOB_ID")',
        "if [[ $state != *JobState=RUNNING* ]]; then exit 1; fi  # it was cancelled",
        'if [ "$(saved)" = "$before" ] && [[ $state != *PreemptTime=2* ]]; then',
        '    echo "job $SLURM_JOB_ID ended with status $status and saved nothing new: it is not requeued" >&2',
        "    exit $((status > 0 ? status : 1))",
        "fi",
        'echo "job $SLURM_JOB_ID resumes from its last checkpoint" >&2',
        'scontrol requeue "$SLURM_JOB_ID" ||',
        f'    sbatch --dependency=afterany:"$SLURM_JOB_ID" {"--array=$SLURM_ARRAY_TASK_ID " if job.tasks else ""}'
        f"{shlex.quote(str(job.path))}",
    ]
    return "\n".join(lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _names(job: Job) -> list[str]:
    """Return the lines that set `$task` to the name of this array task."""
    if not job.tasks:
        return []
    names = [f"    {shlex.quote(name)}  # {number}" for number, name in enumerate(job.tasks)]
    return ["# The names of the array tasks, by number.", "tasks=(", *names, ")",
            "task=${tasks[$SLURM_ARRAY_TASK_ID]}", ""]  # fmt: skip


def _cores(job: Job, cluster: ClusterConfig) -> int:
    """Return the cores per rank: those per GPU, or an equal part of a node without GPUs."""
    return max(1, cluster.cpus_per_node // (cluster.gpus_per_node or job.ranks_per_node))


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the options of sbatch, one per line of the script."""
    takes_whole_nodes = job.ranks_per_node == cluster.gpus_per_node or not cluster.gpus_per_node
    options = {
        "--job-name": job.name,
        "--output": job.folder / "slurm" / ("%A_%a.log" if job.tasks else "%j.log"),
        "--comment": job.folder,  # `queued` finds the job by it
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
        "--mem": cluster.memory if takes_whole_nodes or cluster.memory != "0" else None,  # "0" is all of a node
    }
    if cluster.gpus_per_node and cluster.gpu_request != "none":
        options[cluster.gpu_request] = f"{'gpu:' if cluster.gpu_request == '--gres' else ''}{job.ranks_per_node}"
    if job.tasks:
        options["--array"] = f"0-{len(job.tasks) - 1}{f'%{job.at_once}' if job.at_once else ''}"
    formatted = [f"{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*formatted, "--requeue", "--open-mode=append", *map(str, cluster.sbatch)]


def _srun(options: list[str], command: str, job: Job, cluster: ClusterConfig) -> str:
    """Return the line that starts a command on the nodes of a job, in its container."""
    arguments = ["srun", *options]
    if cluster.container != "none":
        mounts = [*dict.fromkeys(f"{path}:{path}" for path in (Path.cwd(), job.folder)), *map(str, cluster.mounts)]
        workdir, image = shlex.quote(str(Path.cwd())), shlex.quote(str(cluster.image))
        mounted = shlex.quote(",".join(mounts))
        if cluster.container == "pyxis":
            arguments += [
                f"--container-image={image}",
                f"--container-mounts={mounted}",
                f"--container-workdir={workdir}",
            ]
        else:
            gpus = "--nv " if cluster.gpus_per_node else ""
            command = f"apptainer exec {gpus}--bind {mounted} --pwd {workdir} {image} {command}"
    return " ".join([*arguments, "\\\n   ", command])


def doctor_of(cluster: ClusterConfig, code: Path, overrides: list[str]) -> str:
    """Return the command that checks a node before a job trains on it."""
    module = shlex.quote(str(code / "launch" / "run_module.py"))
    return " ".join([python_of(cluster), "-u", module, "launch.doctor quick=true", *map(shlex.quote, overrides)])


def command_of(cluster: ClusterConfig, nodes: int, ranks_per_node: int, code: Path, overrides: list[str]) -> str:
    """Return the command that `srun` starts to train: train.py itself, or torchrun with the ranks of a node."""
    launcher = [python_of(cluster), "-u"]
    if cluster.tasks == "node":
        # Without SIGUSR1 among these it kills torchrun, which leaves its ranks behind.
        launcher += [
            "-m torch.distributed.run",
            f"--nnodes={nodes} --nproc-per-node={ranks_per_node} --node-rank=$SLURM_NODEID",
            "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        ]
    command = " ".join([*launcher, shlex.quote(str(code / "train.py")), *map(shlex.quote, overrides)])
    # $SLURM_NODEID differs between tasks, so it is expanded there and not in the script.
    return f"bash -c {shlex.quote(f'exec {command}')}" if cluster.tasks == "node" else command


def python_of(cluster: ClusterConfig) -> str:
    """Return the interpreter of a job: the cluster's, else that of the container, else the one that submits it."""
    return cluster.python or (sys.executable if cluster.container == "none" else "python")


def _version() -> str:
    """Return the commit of the code, to quote in a script."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return f"commit {git('rev-parse', '--short=12', 'HEAD')}{', changed' if git('status', '--porcelain') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


# ---------------------------------------------------------------------------------------------------------- submission


def submit(jobs: list[Job], cluster: ClusterConfig) -> list[str]:
    """Write the scripts of a folder's jobs beside their code, and submit them; each starts when the one before has ended.

    Returns:
        Their job numbers.

    Raises:
        UserError: there is no sbatch, or SLURM rejects a job; the scripts remain.
    """
    folder = jobs[0].folder / "slurm"
    with explain_os_errors("write the job to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _keep_code(folder / "code")
        for job in jobs:
            with atomic_write(job.path) as file:
                file.write(render(job, cluster))
            job.path.chmod(0o755)
    ids: list[str] = []
    for job in jobs:
        dependency = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(_sbatch([*dependency, str(job.path)]))
    return ids


def _sbatch(arguments: list[str]) -> str:
    script = arguments[-1]
    try:
        submitted = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=_job_environment(os.environ),
        )
    except FileNotFoundError:
        print(Path(script).read_text(encoding="utf-8"), end="")
        raise UserError(
            f"there is no sbatch here: the script above is {script}; on a node of the cluster with access to this folder, "
            f"run  sbatch {script}"
        ) from None
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.replace("sbatch: error:", "").split())
        raise UserError(
            f"SLURM rejected the job: {message.rstrip('.')}. Change its request with cluster.KEY=VALUE (partition, "
            f"account, time, memory, nodes=N) or in {script}"
        ) from error
    return submitted.stdout.strip().split(";")[0]


def _job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment to submit a job from: without what a job or step that this process is part of has set.

    sbatch hands its environment on, and srun in the job would take an outer job's number of tasks or memory for options.
    """
    kept = without_launcher(environment).items()
    return {name: value for name, value in kept if not name.startswith("SLURM_") or name in _CLIENT_SETTINGS}


def _keep_code(target: Path) -> None:
    """Copy the code to a folder, replacing that of an earlier job."""
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
    """An unfinished job or array task in SLURM's queue."""

    number: str
    state: str  # one of RUNS, or of a pending job
    name: str
    task: int | None


def queued(folder: Path) -> list[Queued]:
    """Return the pending and running jobs of a folder, whoever submitted them; none where there is no SLURM."""
    command = ["squeue", "--noheader", "--array", f"--states={','.join(_UNFINISHED)}", "--format=%i|%T|%j|%K|%k"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    jobs = []
    for line in listing.splitlines():
        number, state, name, task, comment = line.split("|", maxsplit=4)
        if comment == str(folder.resolve()):
            jobs.append(Queued(number, state, name, int(task) if task.isdigit() else None))
    return jobs


def refuse_queued(folder: Path) -> None:
    """Refuse a folder whose jobs are still in SLURM's queue.

    Raises:
        UserError: there are any.
    """
    if jobs := queued(folder):
        first, more = jobs[0], len(jobs) - 1
        raise UserError(
            f"{folder} has been submitted already: job {first.number} is {first.state.lower()}"
            f"{f', and {more} more' if more else ''}; wait for it, or run  scancel {first.number.split('_')[0]}"
        )
