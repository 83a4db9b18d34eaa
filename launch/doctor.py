"""Check this machine for problems, with advice on how to fix them: `python -m launch.doctor`.

    KEY=VALUE        as for train.py: also checks what the run requires, such as model.attention=flash
    quick=true       only checks that take a moment
    gate=FILE        those, the node's hardware and half a second of all-reduce: for the start of a job. The name of a node that
                     cannot train is appended to FILE; one that passes its own checks writes FILE.ok.NODE before the all-reduce
    gpus=N           GPUs that the job uses on each node
    cluster=NAME     a file of conf/cluster, to compare the measured bandwidth with its data sheet

Prints a line per finding: green is fine, yellow is suboptimal, red will not work; the status is 1 if any is red. Under a
launcher (`srun --ntasks-per-node=1 python -m launch.doctor`) every node checks itself, clocks and versions are compared between
nodes, and a collective is benchmarked over all of them for two seconds; otherwise over the GPUs of this machine, or two ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from conf.cluster_schema import ClusterConfig
from conf.load import load
from conf.login import wandb_mode
from conf.overrides import check_overrides
from conf.schema import Config
from conf.shape import check_divisibility, shape_of
from conf.validate import validate
from kernels.c.toolchain import FLAGS, find_compiler, triton_problem
from kernels.common.commands import run_command
from kernels.common.errors import TryAgain, UserError
from kernels.common.options import split_options
from launch.estimate.counts import checkpoint_bytes
from launch.finding import GREEN, RED, YELLOW, Finding, Report
from launch.installed import installed_versions
from launch.launchers import Launchers, refuse_taken_port, refuse_unknown_master
from launch.preflight import node_findings, sheet_bandwidth, slow_nodes
from launch.ranks import Ranks, export, find_ranks, installed_gpus, take_local_rank, without_launcher
from launch.sbatch import read_cluster

_OPTIONS = {"quick": False, "gate": "", "gpus": 0}
_DISTRIBUTION, _EXTRA = "formula-ffn", "train"  # the kernels alone need fewer packages
_MIN_OPEN_FILES, _MIN_SHARED_BYTES = 4096, 2**30
_DISK_MEGABYTES = 128
_MAX_SKEW = 1.0  # seconds between the clocks of nodes: a larger skew confuses logs and file times
_GATE_SECONDS = 0.5
_SLOW = 0.2  # fraction of a data sheet's bandwidth


def main(argv: list[str]) -> int:
    argv, local_rank = take_local_rank(argv)
    options, arguments = split_options(argv, _OPTIONS)
    cluster, overrides = read_cluster(arguments)
    check_overrides(overrides, _OPTIONS)
    config = load(overrides)
    ranks = Ranks()
    with contextlib.suppress(UserError):  # `launcher` reports it
        ranks = find_ranks(local_rank=local_rank)
    if (options["quick"] or options["gate"]) and ranks.world_size > 1:
        # The first rank that exits with status 1 makes the launcher end the others, which still have findings to print.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report = Report(ranks.rank, f"{socket.gethostname()}: " if ranks.world_size > 1 else "")
    if options["gate"]:
        gate(report, ranks, Path(options["gate"]), config, cluster, options["gpus"])
    else:
        report.show(findings(config, cluster, ranks, options["quick"]))
    return int(report.worst == RED)


def gate(report: Report, ranks: Ranks, path: Path, config: Config, cluster: ClusterConfig | None, gpus: int) -> None:
    """Show what decides whether a job trains on its nodes, and write to `path` and beside it whether this one can.

    Both are written before the collective, which may end this process, or wait for a node that does not come.

    Args:
        gpus: that the job uses on each node.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report.show(findings(config, cluster, ranks, quick=True))
    report.show(node_findings(gpus))
    problem = rendezvous(ranks) if ranks.world_size > 1 else None
    report.show([problem] if problem else [])
    if report.worst != RED:
        path.with_name(f"{path.name}.ok.{node}").touch()
    report.name_fault(path, node)
    if ranks.world_size > 1 and not problem:
        try:
            report.show(collective(ranks, cluster, _GATE_SECONDS))
        except RuntimeError as error:
            text = f"the nodes cannot communicate: {str(error).splitlines()[0]}"
            report.show([Finding(RED, "collective", text, "NCCL_DEBUG=INFO prints details")])
        report.name_fault(path, node)


def findings(config: Config, cluster: ClusterConfig | None, ranks: Ranks, quick: bool) -> Iterator[Finding]:
    """Yield the findings of all checks as they complete."""
    yield python()
    yield from packages()
    configured = configuration(config)
    yield configured
    yield from optional_packages(config)
    yield compiler()
    yield launcher()
    yield wandb(config.runs)
    if configured.level == GREEN:  # a shape that cannot be has no size
        yield space(config)
    yield shared_memory()
    yield open_files()
    if quick:
        return
    if configured.level == GREEN:
        yield disk_speed(config)
    yield from torch_and_gpus()
    yield deepspeed_ops()
    yield from collective(ranks, cluster)


# ------------------------------------------------------------------------------------------------ checks that take a moment


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= tuple(sys.version_info[:2]) <= (3, 13):
        return Finding(GREEN, "Python", version)
    return Finding(RED, "Python", f"{version} is not 3.10 to 3.13", "make PYTHON=/path/to/python3.12 setup")


def packages() -> Iterator[Finding]:
    """Yield whether the dependencies of pyproject.toml are installed, in versions that it allows."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            RED, "packages", "this project is not installed for this Python", "make setup, and .venv/bin/python"
        )
        return
    problems, good = [], 0
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": _EXTRA}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(Finding(RED, requirement.name, "is not installed", "make setup"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good += 1
        else:
            text = f"{version} is not {requirement.specifier}"
            problems.append(Finding(YELLOW, requirement.name, text, f"pip install '{requirement}'"))
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions("torch", "deepspeed").items())
    yield Finding(GREEN, "packages", f"{good} of {good + len(problems)} at required versions ({versions})")
    yield from problems


def configuration(config: Config) -> Finding:
    """Validate the configuration as training does, for as many ranks as it needs: the doctor itself has one per node."""
    try:
        validate(config, config.parallel.tensor * config.parallel.context)
        check_divisibility(shape_of(config), config.parallel)
    except UserError as error:
        return Finding(RED, "configuration", str(error), "python train.py --help lists the keys")
    return Finding(GREEN, "configuration", f"{config.run} is valid")


def optional_packages(config: Config) -> Iterator[Finding]:
    """Yield whether the optional packages that the configuration requires are installed."""
    for required, override, package, install in (
        (config.model.attention == "flash", "model.attention=flash", "flash_attn", "flash-attn"),
        (config.model.attention == "flex", "model.attention=flex", "torch", "torch"),
        (config.ffn.backend == "triton", "ffn.backend=triton", "triton", "triton"),
        (config.logger.tensorboard, "logger.tensorboard=true", "tensorboard", "tensorboard"),
        (config.data.source == "hf", "data.source=hf", "datasets", "datasets"),
    ):
        is_installed = importlib.util.find_spec(package) is not None
        if required and not is_installed:
            yield Finding(RED, override, f"{package} is not installed", f"pip install {install}, or omit {override}")
        elif required and override.startswith("model.attention=") and not installed_gpus():
            yield Finding(RED, override, "needs a GPU, and this machine has none", "model.attention=auto")
        elif required:
            yield Finding(GREEN, override, f"{package} is installed")
        elif package in ("flash_attn", "triton") and installed_gpus():
            text = "is installed" if is_installed else "is not installed: torch's own kernels are used instead"
            yield Finding(GREEN if is_installed else YELLOW, package, text, f"pip install {install}")


def compiler() -> Finding:
    """Compile a line of C with the flags of the kernels."""
    # Without one training goes on in plain torch; on GPUs that wastes them, so a job must not start.
    if installed_gpus() and (missing := triton_problem()):
        return Finding(RED, "compiler", f"Triton cannot launch its kernels: {missing}")
    name = find_compiler()
    if name is None:
        return Finding(
            YELLOW,
            "compiler",
            "there is no cc, gcc or clang: kernels run as plain torch, several times slower",
            "apt install gcc, or module load gcc, or set CC",
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [name, "-fopenmp", *FLAGS, "-", "-o", f"{folder}/a.so", "-lm"]
        done = subprocess.run(command, input="int one(void) { return 1; }\n", capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[0]
        return Finding(
            YELLOW, "compiler", f"{name} does not compile with OpenMP: {message}", "apt install gcc libgomp1, or set CC"
        )
    return Finding(GREEN, "compiler", name)


def launcher() -> Finding:
    """Check the environment variables that launchers set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = {name for name in names if name in os.environ}
    try:
        ranks = find_ranks()
    except UserError as error:
        return Finding(RED, "ranks", str(error), "unset them, and let deepspeed, torchrun, srun or mpirun set them")
    if present and len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        text = f"{missing} is not set although {', '.join(sorted(present))} is: every process would train alone"
        return Finding(RED, "ranks", text, "start it by deepspeed, torchrun, srun or mpirun, or unset them")
    text, tasks = f"rank {ranks.rank} of {ranks.world_size}", os.environ.get("SLURM_NTASKS", "")
    if ranks.world_size == 1 and tasks.isdigit() and int(tasks) > 1:
        text += f"; this allocation has {tasks} tasks, which srun starts"
    return Finding(GREEN, "ranks", text)


def wandb(runs: str) -> Finding:
    mode = wandb_mode()
    if mode == "online":
        return Finding(GREEN, "W&B", "logged in")
    folder = f"{shlex.quote(runs)}/wandb"
    text = f"{mode}: runs stay on this machine; wandb leet {folder} draws them in the terminal"
    return Finding(YELLOW, "W&B", text, f"wandb login; later  wandb sync {folder}/offline-run-*")


def space(config: Config) -> Finding:
    """Compare the free disk space with the checkpoints that a run will keep beside those that it holds already."""
    folder, own = _existing(Path(config.runs)), Path(config.runs) / str(config.run) / "checkpoints"
    leftovers = [*own.glob(".step_*.tmp"), *own.glob(".step_*.old")]  # of interrupted saves: resuming removes them
    free = shutil.disk_usage(folder).free + sum(map(_bytes_in, leftovers))
    held = sum(path.name.removeprefix("step_").isdecimal() for path in own.glob("step_*"))
    more = max(1, config.keep_last + 2 - held)  # also the best one, and one being written
    size = checkpoint_bytes(shape_of(config), config.optim.name)
    kept = f"{more}{' more' if held else ''} checkpoint{'' if more == 1 else 's'}"
    text = f"{free / 1e9:,.1f} GB free in {folder.resolve()}, {more * size / 1e9:,.1f} GB for {kept}"
    level = RED if free < size else YELLOW if free < more * size else GREEN
    return Finding(level, "disk space", text, "free disk space, or set runs=FOLDER or keep_last=1")


def _bytes_in(folder: Path) -> int:
    with contextlib.suppress(OSError):  # another process removes it
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding(GREEN, "shared memory", "not used on this system")
    size = shutil.disk_usage(path).free
    level = YELLOW if size < _MIN_SHARED_BYTES else GREEN
    return Finding(
        level, "shared memory", f"{size / 2**30:.1f} GiB free in {path}", "docker run --shm-size=8g, for NCCL"
    )


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = YELLOW if soft < _MIN_OPEN_FILES else GREEN
    return Finding(level, "open files", f"limit {soft:,}", f"ulimit -n {min(hard, 65536)}: collectives open sockets")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


# -------------------------------------------------------------------------------------------------- checks that take seconds


def disk_speed(config: Config) -> Finding:
    """Measure the write speed of the folder of runs, including fsync."""
    folder, block = _existing(Path(config.runs)), os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            start = time.monotonic()
            for _ in range(_DISK_MEGABYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _DISK_MEGABYTES * 2**20 / (time.monotonic() - start)
    except OSError as error:
        return Finding(RED, "disk", f"{folder.resolve()}: {error.strerror}", "set runs=FOLDER to a writable folder")
    seconds = checkpoint_bytes(shape_of(config), config.optim.name) / speed
    level = YELLOW if speed < 1e8 else GREEN
    return Finding(
        level,
        "disk",
        f"{speed / 1e9:.2f} GB/s; {seconds:,.1f} s per checkpoint with one writer",
        "use a faster file system",
    )


def torch_and_gpus() -> Iterator[Finding]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    if not torch.cuda.is_available():
        if installed_gpus():
            text = f"{torch.__version__} ({cuda}) does not see the {installed_gpus()} GPU(s) of this machine"
            yield Finding(RED, "torch", text, "install the build for this driver: nvidia-smi shows its CUDA version")
        else:
            yield Finding(GREEN, "torch", f"{torch.__version__} ({cuda}), {torch.get_num_threads()} thread(s)")
        return
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    from torch.cuda import nccl

    nccl_version = ".".join(map(str, nccl.version()))
    yield Finding(
        GREEN,
        "torch",
        f"{torch.__version__} ({cuda}, NCCL {nccl_version}), {torch.cuda.device_count()} x {', '.join(names)}",
    )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding(YELLOW, "bf16", "these GPUs only emulate it", "precision=fp32")


def deepspeed_ops() -> Finding:
    """List which of DeepSpeed's own kernels could be built. Training needs none of them."""
    names = ("FusedAdamBuilder", "CPUAdamBuilder", "AsyncIOBuilder")
    try:
        with open(os.devnull, "w") as nothing:
            before, sys.stdout = sys.stdout, nothing
            try:
                from deepspeed.ops import op_builder

                can = [name for name in names if getattr(op_builder, name)().is_compatible(verbose=False)]
            finally:
                sys.stdout = before
    except Exception as error:
        return Finding(RED, "DeepSpeed", f"cannot be imported: {error}", "make setup")
    built = ", ".join(name.removesuffix("Builder") for name in can) or "none"
    return Finding(GREEN, "DeepSpeed", f"imports; ops that could be built (none is required): {built}")


def rendezvous(ranks: Ranks) -> Finding | None:
    """Return what keeps this rank from meeting the others: no address for the node of rank 0, or a taken port there."""
    export(ranks)
    Launchers().choose_port(ranks)
    for refuse in (refuse_unknown_master, refuse_taken_port):
        try:
            refuse(ranks)
        except UserError as error:
            text, _, advice = str(error).partition(": ")
            # Another node has the port free. An unknown name may be unknown to all.
            at_fault = refuse is refuse_taken_port and isinstance(error, TryAgain)
            return Finding(RED, "collective", text, advice, node=at_fault)
    return None


def collective(ranks: Ranks, cluster: ClusterConfig | None, seconds: float = 2.0) -> Iterator[Finding]:
    """Yield the bandwidth of an all-reduce over all ranks, or over this machine's devices without a launcher."""
    if ranks.world_size > 1:
        from launch.collective import measure

        if problem := rendezvous(ranks):
            yield problem
            return
        result = measure(seconds)
    else:
        import torch

        world = torch.cuda.device_count() or 2  # a job may see some of a node's GPUs
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        module = str(Path(__file__).with_name("run_module.py"))
        done = subprocess.run(
            [*command, module, "launch.collective"], capture_output=True, text=True, env=without_launcher(os.environ)
        )
        if done.returncode:
            message = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no message")
            yield Finding(
                RED,
                "collective",
                f"{world} ranks could not communicate: {message.strip()}",
                "NCCL_DEBUG=INFO prints details",
            )
            return
        result = json.loads(done.stdout.splitlines()[-1])
    speed = result["bytes_per_second"]
    level, advice, sheet = GREEN, "", ""
    if cluster and cluster.gpus_per_node and result["world_size"] > 1:  # a single rank sends nothing
        rate = sheet_bandwidth(cluster, result["hosts"])
        sheet = f", {speed / rate:.0%} of the {rate / 1e9:,.0f} GB/s of {cluster.name}"
        if speed < _SLOW * rate:
            level, advice = (
                YELLOW,
                "NCCL_DEBUG=INFO prints the network in use; NCCL_SOCKET_IFNAME and NCCL_IB_HCA select one",
            )
    ranked = "1 rank" if result["world_size"] == 1 else f"{result['world_size']} ranks"
    benchmark = f"{result['backend']}, {ranked}, all-reduce of {result['bytes'] / 2**20:.0f} MiB"
    text = f"{benchmark}: {speed / 1e9:.2f} GB/s"
    yield Finding(level, "collective", text + sheet, advice)
    if len(set(result["hosts"])) > 1:
        skew = result["clock_skew"]
        yield Finding(
            YELLOW if skew > _MAX_SKEW else GREEN, "clocks", f"{skew:.2f} s apart at most", "enable NTP on the nodes"
        )
        yield from slow_nodes(result["hosts"], result["matmul_seconds"], ranks.rank, result["backend"] == "nccl")
    versions = {json.dumps(version, sort_keys=True) for version in result["versions"]}
    if len(versions) > 1:
        text = f"differ between nodes: {'; '.join(sorted(versions))}"
        yield Finding(
            RED, "versions", text, "use one environment on all nodes, on a shared file system or in a container"
        )


if __name__ == "__main__":
    run_command(main, __doc__)
