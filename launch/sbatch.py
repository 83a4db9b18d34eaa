"""SLURM jobs: keep their scripts and a copy of the code, and submit them.

<folder>/slurm/job.sh      the script; `sbatch job.sh` submits it again
               code/       a snapshot of the code at submission: later changes do not affect a job that is requeued
               %j.log      the output of the job
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from kernels.common.errors import TryAgain, UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.text import redact
from launch.corpus import arguments_of
from launch.job_script import ROOT, Job, python_of, quote, render, secrets_for
from launch.ranks import without_launcher

_CODE = ("train.py", "ablation", "conf", "data", "kernels", "launch", "model", "training")
_SOURCES = (".py", ".yaml", ".c", ".h", ".jinja")
_STORE_OF_SECRETS = re.compile(r"(?i)(^|[._-])(secrets?|credentials?|passwords?|api_?keys?|hf_token|id_rsa)([._-]|$)")
RUNS = ("RUNNING", "COMPLETING")
_UNFINISHED = ("PENDING", "CONFIGURING", "SUSPENDED", *RUNS)  # states of a job in the queue
_NO_CLUSTER = "Could not establish a configuration source"  # SLURM's commands where they are installed for no cluster
_MOST_SIGNAL_SECONDS = 65535  # that sbatch --signal takes
_CLIENT_SETTINGS = (
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_JWT",
    "SLURM_CLUSTERS",
)  # of SLURM's commands, set by users


def read_cluster(arguments: list[str]) -> tuple[ClusterConfig | None, list[str]]:
    """Return the cluster that the arguments name, None if there is none, and all other arguments."""
    if not any(argument.startswith(("cluster=", "cluster.")) for argument in arguments):
        return None, arguments
    return read_group("cluster", ClusterConfig, arguments, "cluster")


def check(cluster: ClusterConfig, ranks_per_node: int) -> None:
    """Refuse settings that a cluster cannot satisfy.

    Raises:
        UserError: more ranks per node than GPUs or cores; a container without an image, or of an unknown kind; a signal
            that SLURM cannot send before the time limit.
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
    if not 0 < cluster.signal_seconds <= _MOST_SIGNAL_SECONDS:
        raise UserError(
            f"cluster.signal_seconds={cluster.signal_seconds} must be a number of seconds from 1 to {_MOST_SIGNAL_SECONDS}"
        )
    limit = _limit_seconds(str(cluster.time))
    if limit and limit <= cluster.signal_seconds:
        raise UserError(
            f"cluster.time={cluster.time} is not longer than cluster.signal_seconds={cluster.signal_seconds}: the job would "
            "be told to save as it starts"
        )


def _limit_seconds(time: str) -> int:
    """Return the seconds of a time limit as sbatch reads it; 0: none, or one that SLURM itself refuses.

    MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS.
    """
    if not (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)):
        return 0
    days, *given = match.groups()
    numbers = [int(number) for number in given if number is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def submit(jobs: list[Job], cluster: ClusterConfig, corpora: Sequence[list[str]] = ()) -> list[str]:
    """Write the scripts of a folder's jobs beside their code, and submit them; each starts when the one before has ended.

    Args:
        corpora: overrides of runs whose corpora a job before them prepares.

    Returns:
        Their job numbers.

    Raises:
        UserError: there is no sbatch, or SLURM rejects a job; the scripts remain, and jobs submitted before are cancelled.
    """
    folder = jobs[0].folder / "slurm"
    with explain_os_errors("write the job to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _keep_code(folder / "code")
        clusters = [cluster] * len(jobs)
        if corpora:
            first, of_cpus = prepare_job(jobs[0], cluster, corpora)
            jobs = [first, dataclasses.replace(jobs[0], after="afterok"), *jobs[1:]]
            clusters = [of_cpus, *clusters]
        for job, its_cluster in zip(jobs, clusters, strict=True):
            with atomic_write(job.path) as file:
                file.write(render(job, its_cluster))
            job.path.chmod(0o755)
    for path in (folder / "excluded", *folder.glob("tries.*")):  # of jobs before
        path.unlink(missing_ok=True)
    if shutil.which("sbatch") is None:
        print(jobs[-1].path.read_text(encoding="utf-8"), end="")
        raise UserError(
            f"there is no sbatch here: the script above is {jobs[-1].path}; on a node of the cluster with access to this "
            f"folder, run  {_by_hand(jobs)}"
        )
    ids: list[str] = []
    for job in jobs:
        dependency = [f"--dependency={job.after}:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        try:
            ids.append(_sbatch([*dependency, str(job.path)], secrets_for(cluster)))
        except UserError as error:
            raise UserError(f"{error}{_take_back(ids)}") from error
    return ids


def _take_back(ids: list[str]) -> str:
    """Cancel jobs that were submitted for one that SLURM rejects; return what to add to its words."""
    if not ids:
        return ""
    try:
        subprocess.run(["scancel", *ids], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"; before the next attempt run  scancel {' '.join(ids)}  for what was submitted before it"
    return f"; what was submitted before it is cancelled: {' '.join(ids)}"


def _by_hand(jobs: list[Job]) -> str:
    """Return the command that submits jobs, each to start after the one before."""
    command = ""
    for job in jobs:
        after = f"--dependency={job.after}:$({command.replace('sbatch', 'sbatch --parsable', 1)}) " if command else ""
        command = f"sbatch {after}{shlex.quote(str(job.path))}"
    return command


def prepare_job(job: Job, cluster: ClusterConfig, runs: Sequence[list[str]]) -> tuple[Job, ClusterConfig]:
    """Return the job that tokenizes the corpora of runs before another job, on one node without GPUs, and its cluster."""
    code = job.folder / "slurm" / "code"
    module = str(code / "launch" / "run_module.py")
    command = [python_of(cluster), "-u", module, *arguments_of(runs, "prepare=true")]
    return Job(
        name=f"{job.name}-prepare", folder=job.folder, command=" ".join(map(quote, command)), doctor="",
        typed=job.typed, saved="", script="prepare.sh",
    ), cpu_nodes(cluster)  # fmt: skip


def cpu_nodes(cluster: ClusterConfig, typed: Collection[str] = ()) -> ClusterConfig:
    """Return a cluster's nodes without GPUs, which prepare corpora.

    Args:
        typed: keys that were given for these nodes. Of the others, what describes the nodes with GPUs or asks for them does not
            hold in a partition of its own: there a job takes a whole node, whatever its cores and memory.
    """
    changes: dict[str, Any] = {"gpus_per_node": 0, "gpu_request": "none"}
    if cluster.cpu_partition:
        own = {"cpus_per_node": 0, "memory": "0", "constraint": None, "qos": None, "sbatch": []}
        changes |= {key: value for key, value in own.items() if key not in typed} | {"partition": cluster.cpu_partition}
    nodes = dataclasses.replace(cluster, **changes)
    return nodes if nodes.cpus_per_node else dataclasses.replace(nodes, sbatch=[*nodes.sbatch, "--exclusive"])


def _sbatch(arguments: list[str], secrets: Mapping[str, str] | None = None) -> str:
    script = arguments[-1]
    try:
        submitted = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**_job_environment(os.environ), **(secrets or {})},
        )
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.replace("sbatch: error:", "").split())
        raise UserError(
            f"SLURM rejected the job: {message.rstrip('.')}. Change its request with cluster.KEY=VALUE (partition, "
            f"account, time, memory, nodes=N) or in {shlex.quote(script)}"
        ) from error
    # Sites may print a greeting before it, and a federation the cluster's name after it.
    last = (submitted.stdout.strip().splitlines() or [""])[-1]
    if not (number := re.fullmatch(r"(\d+)(;.*)?", last.strip())):
        raise UserError(
            f"sbatch printed no job number but {last!r}: whether it took {shlex.quote(script)} is shown by  squeue --me"
        )
    return number[1]


def _job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment to submit a job from: without what a job or step that this process is part of has set.

    sbatch hands its environment on, and srun in the job would take an outer job's number of tasks or memory for options.
    """
    kept = without_launcher(environment).items()
    return {name: value for name, value in kept if not name.startswith("SLURM_") or name in _CLIENT_SETTINGS}


def _keep_code(target: Path) -> None:
    """Copy the code to a folder, replacing that of an earlier job: source files, without what may hold a secret."""
    partial = target.with_name(f".code.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, partial / name, ignore=_no_code, copy_function=_copy_without_secrets)
        else:
            partial.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, partial / name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _no_code(folder: str, names: list[str]) -> set[str]:
    """Return what a snapshot leaves out: hidden files, all but source files, and those named like a store of secrets."""
    return {
        name
        for name in names
        if name.startswith((".", "__pycache__"))
        or _STORE_OF_SECRETS.search(name)
        or not (Path(folder, name).is_dir() or name.endswith(_SOURCES))
        or (Path(folder, name).is_symlink() and not Path(folder, name).resolve().is_relative_to(ROOT))
    }


def _copy_without_secrets(source: str, target: str) -> None:
    """Copy a file; in YAML, the values of keys that are named like a secret are hidden."""
    if source.endswith(".yaml"):
        lines = Path(source).read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        content = "".join(map(redact, lines))
        Path(target).write_text(content, encoding="utf-8", errors="surrogateescape")
    else:
        shutil.copy2(source, target)


@dataclasses.dataclass(frozen=True)
class Queued:
    """An unfinished job or array task in SLURM's queue."""

    number: str
    state: str  # one of RUNS, or of a pending job
    name: str
    task: int | None


def queued(folder: Path) -> list[Queued]:
    """Return the pending and running jobs of a folder, whoever submitted them; none where there is no SLURM.

    Raises:
        TryAgain: SLURM does not answer.
    """
    command = ["squeue", "--noheader", "--array", f"--states={','.join(_UNFINISHED)}", "--format=%i|%T|%K|%j|%k"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return []
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(error.stderr if isinstance(error, subprocess.CalledProcessError) else error)
        if _NO_CLUSTER in said:
            return []
        raise TryAgain(
            f"squeue does not say whether jobs of {folder} are queued: {' '.join(said.split())}; run the same command again "
            "once SLURM answers"
        ) from error
    jobs, comment = [], f"|{folder.resolve()}"
    for line in listing.splitlines():
        if line.endswith(comment):
            number, state, task, name = line.removesuffix(comment).split("|", maxsplit=3)  # a name may have a | too
            jobs.append(Queued(number, state, name, int(task) if task.isdigit() else None))
    return jobs


def refuse_queued(folder: Path) -> None:
    """Refuse a folder whose jobs are still in SLURM's queue.

    Raises:
        UserError: there are any.
        TryAgain: SLURM does not answer.
    """
    if jobs := queued(folder):
        first, more = jobs[0], len(jobs) - 1
        raise UserError(
            f"{folder} has been submitted already: job {first.number} is {first.state.lower()}"
            f"{f', and {more} more' if more else ''}; wait for it, or run  scancel {first.number.split('_')[0]}"
        )
