"""Write the script of a SLURM job, for a person to read and to submit again by hand."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conf.cluster_schema import ClusterConfig
from conf.load import flatten
from kernels.common.errors import ExitStatus, UserError
from kernels.common.text import CONTROL, assigned_secret, is_secret, printable, secrets_of
from launch.ranks import FIRST_PORT, PORTS

ROOT = Path(__file__).resolve().parents[1]
_WAIT = 20  # seconds between the first rank that exits with status 0 and the last
_CPUS = ["--cpus-per-task=$SLURM_CPUS_PER_TASK"]  # srun does not inherit it
_MOST_TRIES = 3  # that end in a hang, a lost node or a signal, without a new checkpoint
_MOST_EXCLUDED = 16  # nodes: beyond that something else is wrong
_BREAKS_LINE = re.compile(f"{CONTROL.pattern}|[\n\t]")  # what must not stand in a line of a script as it is
_LEFT_BY_SHELL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job: what it runs, and on how many nodes.

    Args:
        name: of the job.
        folder: whose `slurm/` takes script, code and logs; absolute, on a file system shared by all nodes.
        command: shell command for srun to start; `$task` in it is the name of an array task.
        doctor: shell command for srun to start on each node first; `$failed` in it is the file for the names of bad nodes.
        typed: the command that created this job, quoted in the script.
        saved: shell patterns of the checkpoints that a task resumes from. A job that ends without a new one is not requeued.
        stopped: shell command that succeeds if a task with status 0 has only stopped early; None: it never does.
        ending: the run's ending.json, which tells its status where a launcher hides it; None: there is none.
        nodes, ranks_per_node: size of the job.
        per_node: srun tasks per node.
        tasks: names of the array tasks; empty: a single job.
        at_once: array tasks that run at a time; 0: no limit.
        after: SLURM's condition on the job submitted before this one.
        script: file name of the script.
    """

    name: str
    folder: Path
    command: str
    doctor: str
    typed: str
    saved: str
    stopped: str | None = None
    ending: Path | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    per_node: int = 1
    tasks: tuple[str, ...] = ()
    at_once: int = 0
    after: str = "afterany"
    script: str = "job.sh"

    @property
    def path(self) -> Path:
        """The path of its script."""
        return self.folder / "slurm" / self.script


def render(job: Job, cluster: ClusterConfig) -> str:
    """Return the job script.

    Raises:
        UserError: SLURM cannot use the folder of the job, or the script would hold a secret.
    """
    _check_paths(job, cluster)
    script = _script(job, cluster)
    for name, value in (secrets_of() | secrets_for(cluster)).items():
        if len(value) > 5 and value in script:  # a shorter one is a word, and no secret
            raise UserError(f"the job script would hold the value of {name}, and everybody can read it")
    return script


def _script(job: Job, cluster: ClusterConfig) -> str:
    if not job.doctor:  # a job that only prepares
        cpus = _CPUS if not _takes_all(job, cluster) else ["--cpus-per-task=$SLURM_CPUS_ON_NODE"]
        prepare = _srun(["--nodes=1 --ntasks=1", *cpus], job.command, job, cluster)
        return "\n".join([*_head(job, cluster), *_names(job), prepare]) + "\n"
    lines = [
        *_head(job, cluster),
        *_preflight(job, cluster),
        "",
        *_names(job),
        "# The checkpoints that a task resumes from. One that ends without a new one is not requeued, unless it was preempted.",
        f"saved() {{ local IFS=; ls -d {job.saved} 2>/dev/null; }}",
        "before=$(saved)",
        *([f"rm -f {shlex.quote(str(job.ending))}  # of an earlier job"] if job.ending else []),
        "",
        "status=138  # of a signal that came before",
        'if [ -z "$signalled" ]; then',
        f"    {_train(job, cluster)} &",
        "    step=$!",
        '    [ -z "$signalled" ] || kill -USR1 "$step"',
        '    wait "$step"; status=$?',
        '    while [ -n "$signalled" ]; do signalled=; wait "$step"; status=$?; done',
        "fi",
        "",
        f"if [ $status -eq 0 ]{f' && ! {job.stopped}' if job.stopped else ''}; then exit 0; fi",
        *_own_status(job),
        "state=$(show_job)",
        'if [ -n "$state" ] && [[ $state != *JobState=RUNNING* ]]; then',
        '    echo "job $job is ended by SLURM: it was cancelled, or comes again by itself" >&2',
        "    exit 1",
        "fi",
        *_whether_again(job),
        'echo "job $job resumes from its last checkpoint" >&2',
        'scontrol requeue "$job" ||',
        f'    sbatch --dependency=afterany:"$job" {"--array=$SLURM_ARRAY_TASK_ID " if job.tasks else ""}'
        f"{shlex.quote(str(job.path))}",
    ]
    return "\n".join(lines) + "\n"


def _own_status(job: Job) -> list[str]:
    """Return the lines that set `$status` to what the run itself says: srun's is that of a rank killed after the first one."""
    if job.ending is None:
        return []
    pattern = 's/.*"exit_status": \\([0-9]*\\).*/\\1/p'
    return [f"own=$(sed -n '{pattern}' {shlex.quote(str(job.ending))} 2>/dev/null); status=${{own:-$status}}"]


def _whether_again(job: Job) -> list[str]:
    """Return the lines that end the job for good, where another try would end as this one did."""
    return [
        "if [ $status -eq 2 ] || [ $status -eq 3 ]; then",
        '    echo "job $job ended with status $status, as it would again: it is not requeued" >&2',
        "    exit $status",
        "fi",
        "# Tries without a new checkpoint, also under other numbers.",
        f"tries=$slurm/tries.{Path(job.script).stem}{'.$SLURM_ARRAY_TASK_ID' if job.tasks else ''}",
        'if [ "$(saved)" != "$before" ] || [[ $state == *PreemptTime=2* ]]; then rm -f "$tries"',
        f"elif [ $status -eq {ExitStatus.HUNG:d} ] || [ $status -eq {ExitStatus.TRY_AGAIN:d} ] || [ $status -gt 128 ]; then",
        '    echo >> "$tries"  # a hang, a lost node, a signal',
        f'    if [ "$(wc -l < "$tries")" -gt {_MOST_TRIES} ]; then',
        '        echo "job $job ended with status $status again and saved nothing new: it is not requeued" >&2',
        '        rm "$tries"',
        "        exit $status",
        "    fi",
        "else",
        '    echo "job $job ended with status $status and saved nothing new: it is not requeued" >&2',
        "    exit $((status > 0 ? status : 1))",
        "fi",
    ]


def _head(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the lines for sbatch, and those that set up the environment."""
    return [
        "#!/bin/bash",
        f"# {_line(job.name)}: {_count(job.nodes, 'node')} with {_count(job.ranks_per_node, 'rank')} each"
        + (f", an array of {_count(len(job.tasks), 'task')}" if job.tasks else ""),
        f"# written by  {_line(job.typed)}",
        f"# with the code of {_line(job.folder)}/slurm/code ({_version()})",
        f"# submit it again: sbatch {'--array=TASK ' if job.tasks else ''}{shlex.quote(str(job.path))}",
        *(f"#SBATCH {option}" for option in _options(job, cluster)),
        *(_signals(cluster) if job.doctor else []),
        "",
        "# What the shell that submitted this job may have left behind.",
        f"unset {' '.join(_LEFT_BY_SHELL)} ${{!SLURM_STEP_@}} ${{!SLURM_CPU_BIND@}} ${{!TORCHELASTIC_@}} ${{!OMPI_COMM_@}}",
        *(f"module load {' '.join(map(quote, str(module).split()))}" for module in cluster.modules),
        *cluster.setup,
        f"export OMP_NUM_THREADS={'$SLURM_CPUS_ON_NODE' if _takes_all(job, cluster) else _cores(job, cluster)}",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# Where nothing resolves a node's name, its address is the one by which SLURM reaches it.",
        'getent hosts "$MASTER_ADDR" > /dev/null || MASTER_ADDR=$(scontrol -o show node "$MASTER_ADDR" | '
        "sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')",
        "# Distinct for jobs that share a node, another one after a requeue, and below the ports that connections take.",
        f"export MASTER_PORT=$(({FIRST_PORT} + (SLURM_JOB_ID + 101 * ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))",
        *_exports(cluster),
        *(_own_number(job) if job.doctor else []),
        "",
    ]


def _signals(cluster: ClusterConfig) -> list[str]:
    """Return the lines that handle the signals of SLURM: first of all, as one without a handler ends the script."""
    return [
        "",
        f"# {cluster.signal_seconds} s before the time limit SLURM sends USR1 to this script, which forwards it: all ranks",
        "# then stop after the same step and save. Before a preemption SLURM sends TERM to this script, to the ranks, or to",
        "# both.",
        "signalled= step=",
        """trap 'signalled=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM""",
    ]


def _own_number(job: Job) -> list[str]:
    """Return the lines that set `$job` to the number of this job, by which scontrol changes it and nothing else."""
    of_task = [
        "# Of this task alone: one task of an array has the number of the array as its SLURM_JOB_ID.",
        "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
    ]
    return [
        *(of_task if job.tasks else ["job=$SLURM_JOB_ID"]),
        "# What SLURM says of it, whose controller may be busy for minutes.",
        'show_job() { for _ in {1..20}; do scontrol -o show job "$job" && break; sleep 15; done; }',
    ]


def _exports(cluster: ClusterConfig) -> list[str]:
    """Return the lines that set the cluster's variables; secrets come with the job's environment, not in a script."""
    secrets = secrets_for(cluster)
    names = " ".join(secrets)
    hidden = [f"# Secrets are not written here. Before sbatch is called by hand: export {names}"] if names else []
    others = {name: value for name, value in cluster.environment.items() if name not in secrets}
    return [*hidden, *(f"export {name}={quote(str(value))}" for name, value in others.items())]


def secrets_for(cluster: ClusterConfig) -> dict[str, str]:
    """Return the variables of a cluster that are secrets by their name."""
    return {str(name): str(value) for name, value in cluster.environment.items() if is_secret(str(name))}


def quote(text: str) -> str:
    """Quote a text for bash, in one line whatever it contains."""
    if not _BREAKS_LINE.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    kept = _BREAKS_LINE.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in match[0].encode()), escaped)
    return f"$'{kept}'"


def _preflight(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the lines that check the nodes, and that queue the job again without those that fail."""
    per_node = ["--nodes=$SLURM_NNODES --ntasks=$SLURM_NNODES --ntasks-per-node=1", *_CPUS]
    again = f"{'--array=$SLURM_ARRAY_TASK_ID ' if job.tasks else ''}{shlex.quote(str(job.path))}"
    return [
        "# Check the nodes, all of them together. Without those that cannot train the job is queued again.",
        f"slurm={shlex.quote(f'{job.folder}/slurm')}; failed=$slurm/failed.$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}",
        f'if ! {_srun(per_node, job.doctor, job, cluster)} && [ -z "$signalled" ]; then',
        "    # Also at fault: a node that did not get through its own checks, or could not begin them, where most others did.",
        "    passed=0 others=",
        '    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do',
        '        if [ -e "$failed.ok.$node" ]; then passed=$((passed + 1)); else others="$others $node"; fi',
        "    done",
        '    if [ $((2 * passed)) -ge "$SLURM_NNODES" ]; then for node in $others; do echo "$node"; done >> "$failed"; fi',
        '    [ ! -s "$failed" ] || cat "$failed" >> "$slurm/excluded"  # tasks of an array may each name the same node',
        f'    if [ ! -s "$failed" ] || [ "$(sort -u "$slurm/excluded" | wc -l)" -gt {_MOST_EXCLUDED} ]; then',
        '        echo "job $job cannot train here, for the reasons in red: it is not queued again" >&2',
        "        exit 1",
        "    fi",
        "    # Beside the nodes that it was submitted without: what is excluded now replaces those.",
        r"""    bad=$(show_job | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')""",
        '    bad=$({ [ -z "$bad" ] || scontrol show hostnames "$bad"; cat "$slurm/excluded"; } | sort -u | paste -sd,)',
        '    rm -f "$failed"*',
        '    echo "job $job is queued again without $bad" >&2',
        "    # Under its own number, as other jobs may wait for it. Nodes can be excluded once it is queued, and SLURM tells",
        "    # this script to end at that moment.",
        "    trap '' TERM",
        '    if scontrol requeue "$job"; then',
        '        scontrol update JobId="$job" ExcNodeList="$bad" && exit 0',
        '        scancel "$job"  # it would come back to the same nodes',
        "    fi",
        f'    exec sbatch --exclude="$bad" --dependency=afterany:"$job" {again}',
        "fi",
        'rm -f "$failed"*',
        "",
        "# srun begins each line of what follows with the number of its task.",
        "first=0",
        'for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do',
        f'    echo "task $first{" and on" if job.per_node > 1 else ""}: $node"; first=$((first + {job.per_node}))',
        "done",
    ]


def _train(job: Job, cluster: ClusterConfig) -> str:
    """Return the command that starts the tasks that train."""
    # A failed rank ends the others, and so does one that exits while others remain (on a lost node).
    options = [f"--ntasks={job.nodes * job.per_node}", "--distribution=block", "--label", "--cpu-bind=cores"]
    return _srun([*options, "--kill-on-bad-exit=1", f"--wait={_WAIT}", *_CPUS], job.command, job, cluster)


def _line(text: object) -> str:
    """Return a text for a comment: in one line, so that none of it becomes a command."""
    return printable(" ".join(str(text).split()))


def _check_paths(job: Job, cluster: ClusterConfig) -> None:
    """Refuse names that SLURM or a container reads as something else.

    Raises:
        UserError: there is one.
    """
    for path in (job.folder, Path.cwd()):
        if unusual := re.search(r"[\x00-\x1f\x7f\\]", str(path)):
            raise UserError(
                f"{str(path)!r} has the character {unusual.group()!r}, and SLURM cannot write a log there: choose another "
                "folder, or another name with run=NAME"
            )
        if cluster.container != "none" and (unusual := re.search("[:,]", str(path))):
            raise UserError(
                f"{str(path)!r} has the character {unusual.group()!r}, which separates the mounts of a container: choose "
                "another folder, or another name with run=NAME"
            )
    for text in (job.name, *job.tasks):
        if unusual := _BREAKS_LINE.search(text):
            raise UserError(
                f"{text!r} has the character {unusual.group()!r}, and SLURM cannot call a job or a task that"
            )
    for key, value in flatten(dataclasses.asdict(cluster)).items():
        lines = key == "setup" or key.startswith("environment.")  # several lines of shell, and what `quote` writes
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if unusual := re.search("\x00" if lines else _BREAKS_LINE, text):
            raise UserError(
                f"cluster.{key} has the character {unusual.group()!r}, which a job script cannot hold there"
            )
        if not key.startswith("environment.") and (secret := assigned_secret(text)):
            raise UserError(
                f"cluster.{key} writes out {secret}, and everybody can read a job script: give it as "
                f"cluster.environment.{secret}=VALUE, which is handed to sbatch and not written"
            )
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise UserError(f"cluster.environment: {str(name)!r} is not a name of an environment variable")


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


def _takes_all(job: Job, cluster: ClusterConfig) -> bool:
    """Return whether a job takes all cores of its node, as nobody knows how many a node of that partition has."""
    return not job.doctor and not cluster.cpus_per_node


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the options of sbatch, one per line of the script."""
    takes_whole_nodes = job.ranks_per_node == cluster.gpus_per_node or not cluster.gpus_per_node
    options = {
        "--job-name": job.name,
        # In this option SLURM reads %u and the like as its own, and %% as %.
        "--output": f"{job.folder}/slurm/".replace("%", "%%") + ("%A_%a.log" if job.tasks else "%j.log"),
        "--comment": job.folder,  # `queued` finds the job by it
        "--chdir": Path.cwd(),
        "--nodes": job.nodes,
        "--ntasks-per-node": job.per_node,
        "--cpus-per-task": _cores(job, cluster) * job.ranks_per_node // job.per_node
        if not _takes_all(job, cluster)
        else None,
        "--time": cluster.time,
        "--signal": f"B:USR1@{cluster.signal_seconds}" if job.doctor else None,  # what only prepares does not listen
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


def doctor_of(cluster: ClusterConfig, code: Path, ranks_per_node: int, overrides: list[str]) -> str:
    """Return the command that checks a node before a job trains on it."""
    module = shlex.quote(str(code / "launch" / "run_module.py"))
    gpus = ranks_per_node if cluster.gpus_per_node else 0
    options = ["launch.doctor", '"gate=$failed"', f"gpus={gpus}", *map(quote, overrides)]
    return " ".join([python_of(cluster), "-u", module, *options])


def command_of(cluster: ClusterConfig, nodes: int, ranks_per_node: int, code: Path, overrides: list[str]) -> str:
    """Return the command that `srun` starts to train: train.py itself, or torchrun with the ranks of a node."""
    launcher = [python_of(cluster), "-u"]
    if cluster.tasks == "node":
        # Without SIGUSR1 among these it kills torchrun before there are ranks that it could be passed on to.
        launcher += [
            shlex.quote(str(code / "launch" / "torchrun.py")),
            f"--nnodes={nodes} --nproc-per-node={ranks_per_node} --node-rank=$SLURM_NODEID",
            "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        ]
    command = " ".join([*launcher, shlex.quote(str(code / "train.py")), *map(quote, overrides)])
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
