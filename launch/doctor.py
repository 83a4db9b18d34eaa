"""What stands in the way of a run on this machine, and what to do about it: `python -m launch.doctor`.

    KEY=VALUE        as for train.py: what the run asks for is looked at too, such as model.attention=flash
    quick=true       only what takes a moment: for the beginning of a job
    cluster=NAME     a machine of conf/cluster, whose data sheet the measured bandwidth is held against

A line a finding: green is well, yellow is less than it could be, red will not work; the status is 1 if any is red. Under a
launcher (`srun --ntasks-per-node=1 python -m launch.doctor`) every node looks at itself, the nodes' clocks and versions are
compared, and a collective runs over all of them for five seconds; alone it runs over the GPUs of this machine, or two ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text

from conf.load import load
from conf.login import wandb_mode
from conf.schema import ClusterConfig, Config
from kernels.c.toolchain import FLAGS, find_compiler
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options
from launch.estimate.counts import parameters, shape_of
from launch.installed import installed_versions
from launch.ranks import Ranks, export, find_ranks, installed_gpus, take_local_rank
from launch.sbatch import read_cluster

GREEN, YELLOW, RED = "green", "yellow", "red"
_OPTIONS = {"quick": False}
_DISTRIBUTION = "formula-ffn"
_CHECKPOINT_BYTES = 14  # of a parameter: the bf16 weight, and in fp32 the weight and two moments
_LEAST_FILES, _LEAST_SHARED = 4096, 2**30
_DISK_MEGABYTES = 128
_MOST_SKEW = 1.0  # seconds between the clocks of nodes: more confuses logs and file times
_SLOW = 0.2  # of a data sheet's bandwidth


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found, and what to do if it is not well."""

    level: str
    name: str
    text: str
    advice: str = ""


def main(argv: list[str]) -> int:
    argv, local_rank = take_local_rank(argv)
    options, arguments = split_options(argv, _OPTIONS)
    cluster, overrides = read_cluster(arguments)
    config = load(overrides)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    worst = GREEN
    ranks = Ranks()
    with contextlib.suppress(UserError):  # told of below
        ranks = find_ranks(local_rank=local_rank)
    where = f"{socket.gethostname()}: " if ranks.world_size > 1 else ""
    for finding in findings(config, cluster, ranks, options["quick"]):
        worst = max(worst, finding.level, key=(GREEN, YELLOW, RED).index)
        if ranks.world_size > 1 and finding.level == GREEN and ranks.rank:
            continue  # what is well is told once
        advice = f" -> {finding.advice}" if finding.advice and finding.level != GREEN else ""
        line = (
            Text(f"{finding.level:<7}", style=f"bold {finding.level}")
            + f"{where}{finding.name}: {finding.text}{advice}"
        )
        console.print(line, soft_wrap=True)
    return int(worst == RED)


def findings(config: Config, cluster: ClusterConfig | None, ranks: Ranks, quick: bool) -> Iterator[Finding]:
    """Yield what is found, one after the other, as it is found."""
    yield python()
    yield from packages()
    yield from asked_for(config)
    yield compiler()
    yield launcher()
    yield wandb()
    yield space(config)
    yield shared_memory()
    yield open_files()
    if quick:
        return
    yield disk_speed(config)
    yield from torch_and_gpus()
    yield deepspeed_ops()
    yield from collective(ranks, cluster)


# ------------------------------------------------------------------------------------------------ what takes a moment


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= tuple(sys.version_info[:2]) <= (3, 12):
        return Finding(GREEN, "Python", version)
    return Finding(RED, "Python", f"{version} is not 3.10 to 3.12", "make PYTHON=/path/to/python3.12 setup")


def packages() -> Iterator[Finding]:
    """Yield whether the packages that pyproject.toml names are there, in the versions that it names."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            RED, "packages", "this project is not installed for this Python", "make setup, and .venv/bin/python"
        )
        return
    bad, good = [], 0
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append(Finding(RED, requirement.name, "is not installed", "make setup"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good += 1
        else:
            text = f"{version} is not {requirement.specifier}"
            bad.append(Finding(YELLOW, requirement.name, text, f"pip install '{requirement}'"))
    main_ones = ", ".join(f"{name} {version}" for name, version in installed_versions("torch", "deepspeed").items())
    yield Finding(GREEN, "packages", f"{good} of {good + len(bad)} as wanted ({main_ones})")
    yield from bad


def asked_for(config: Config) -> Iterator[Finding]:
    """Yield whether what the configuration names beside the defaults is there."""
    for asked, package, install in (
        (config.model.attention == "flash" and "model.attention=flash", "flash_attn", "flash-attn"),
        (config.ffn.backend == "triton" and "ffn.backend=triton", "triton", "triton"),
        (config.logger.tensorboard and "logger.tensorboard=true", "tensorboard", "tensorboard"),
        (config.data.source == "hf" and "data.source=hf", "datasets", "datasets"),
    ):
        there = importlib.util.find_spec(package) is not None
        if asked and not there:
            yield Finding(RED, asked, f"{package} is not installed", f"pip install {install}, or leave {asked} out")
        elif asked:
            yield Finding(GREEN, asked, f"{package} is installed")
        elif package in ("flash_attn", "triton") and installed_gpus():
            text = "is installed" if there else "is not installed: torch's own kernels serve instead"
            yield Finding(GREEN if there else YELLOW, package, text, f"pip install {install}")


def compiler() -> Finding:
    """Compile a line of C as the kernels are."""
    name = find_compiler()
    if name is None:
        return Finding(
            YELLOW if installed_gpus() else RED,
            "compiler",
            "there is no cc, gcc or clang: on a CPU kernels run as plain torch, several times slower",
            "apt install gcc, or module load gcc, or set CC",
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [name, "-fopenmp", *FLAGS, "-", "-o", f"{folder}/a.so", "-lm"]
        done = subprocess.run(command, input="int one(void) { return 1; }\n", capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        return Finding(
            YELLOW, "compiler", f"{name} does not compile with OpenMP: {said}", "apt install gcc libgomp1, or set CC"
        )
    return Finding(GREEN, "compiler", name)


def launcher() -> Finding:
    """Look at the variables by which a launcher tells a process who it is."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name for name in names if name in os.environ}
    try:
        ranks = find_ranks()
    except UserError as error:
        return Finding(RED, "ranks", str(error), "unset them, and let deepspeed, torchrun, srun or mpirun set them")
    if found and len(found) < len(names):
        without = ", ".join(name for name in names if name not in found)
        text = f"{without} is not set although {', '.join(sorted(found))} is: every process would train alone"
        return Finding(RED, "ranks", text, "start it by deepspeed, torchrun, srun or mpirun, or unset them")
    return Finding(GREEN, "ranks", f"rank {ranks.rank} of {ranks.world_size}")


def wandb() -> Finding:
    mode = wandb_mode()
    if mode == "online":
        return Finding(GREEN, "W&B", "logged in")
    return Finding(
        YELLOW, "W&B", f"{mode}: runs stay on this machine", "wandb login; later  wandb sync wandb/offline-run-*"
    )


def space(config: Config) -> Finding:
    """Hold the free space of the folder of the runs against the checkpoints that a run keeps."""
    folder = _existing(Path(config.runs))
    free = shutil.disk_usage(folder).free
    count = sum(parameters(shape_of(config)).values())
    needed = _CHECKPOINT_BYTES * count * (config.keep_last + 2)  # the best one, and one that is being written
    text = f"{free / 1e9:,.1f} GB free in {folder.resolve()}, {needed / 1e9:,.1f} GB for {config.keep_last + 2} checkpoints"
    level = RED if free < needed else YELLOW if free < 2 * needed else GREEN
    return Finding(level, "disk space", text, "free some, or runs=FOLDER, or keep_last=1")


def shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding(GREEN, "shared memory", "not used on this system")
    size = shutil.disk_usage(path).free
    level = YELLOW if size < _LEAST_SHARED else GREEN
    return Finding(
        level, "shared memory", f"{size / 2**30:.1f} GiB free in {path}", "docker run --shm-size=8g: NCCL uses it"
    )


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = YELLOW if soft < _LEAST_FILES else GREEN
    return Finding(level, "open files", f"{soft:,} at most", f"ulimit -n {min(hard, 65536)}: collectives take sockets")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


# -------------------------------------------------------------------------------------------------- what takes seconds


def disk_speed(config: Config) -> Finding:
    """Write a file where the runs are, to the disk itself."""
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
        return Finding(RED, "disk", f"{folder.resolve()}: {error.strerror}", "runs=FOLDER, one that can be written")
    seconds = _CHECKPOINT_BYTES * sum(parameters(shape_of(config)).values()) / speed
    level = YELLOW if speed < 1e8 else GREEN
    return Finding(
        level, "disk", f"{speed / 1e9:.2f} GB/s; {seconds:,.1f} s a checkpoint, of one writer", "a faster file system"
    )


def torch_and_gpus() -> Iterator[Finding]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    if not torch.cuda.is_available():
        if installed_gpus():
            text = f"{torch.__version__} ({cuda}) does not see the {installed_gpus()} GPU(s) of this machine"
            yield Finding(RED, "torch", text, "install the build for this driver: nvidia-smi says which CUDA it takes")
        else:
            yield Finding(GREEN, "torch", f"{torch.__version__} ({cuda}), {torch.get_num_threads()} thread(s)")
        return
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(
        GREEN, "torch", f"{torch.__version__} ({cuda}, NCCL {nccl}), {torch.cuda.device_count()} x {', '.join(names)}"
    )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding(YELLOW, "bf16", "these GPUs only emulate it", "precision=fp32")


def deepspeed_ops() -> Finding:
    """Say which of DeepSpeed's own kernels could be built. Training needs none of them."""
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
    return Finding(GREEN, "DeepSpeed", f"imports; of its ops, of which none is needed, it could build: {built}")


def collective(ranks: Ranks, cluster: ClusterConfig | None) -> Iterator[Finding]:
    """Yield what an all-reduce over all ranks reached; over this machine's, if there are no others."""
    if ranks.world_size > 1:
        from launch.collective import measure

        export(ranks)
        told = measure()
    else:
        world = installed_gpus() or 2
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        module = str(Path(__file__).with_name("run_module.py"))
        done = subprocess.run([*command, module, "launch.collective"], capture_output=True, text=True, env=alone)
        if done.returncode:
            said = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "see above")
            yield Finding(
                RED, "collective", f"{world} ranks could not talk: {said.strip()}", "NCCL_DEBUG=INFO says more"
            )
            return
        told = json.loads(done.stdout.splitlines()[-1])
    speed = told["bytes_per_second"]
    level, advice, sheet = GREEN, "", ""
    if cluster and cluster.gpus_per_node:
        wide = told["world_size"] > cluster.gpus_per_node
        hardware = cluster.hardware
        network = cluster.gpus_per_node * hardware.network_bandwidth  # each GPU has a card
        rate = min(hardware.node_bandwidth, network) if wide else hardware.node_bandwidth
        sheet = f", {speed / rate:.0%} of the {rate / 1e9:,.0f} GB/s of {cluster.name}"
        if speed < _SLOW * rate:
            level, advice = (
                YELLOW,
                "NCCL_DEBUG=INFO says which network it takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose",
            )
    what = f"{told['backend']}, {told['world_size']} ranks, all-reduce of {told['bytes'] / 2**20:.0f} MiB"
    text = f"{what}: {speed / 1e9:.2f} GB/s"
    yield Finding(level, "collective", text + sheet, advice)
    if len(set(told["hosts"])) > 1:
        skew = told["clock_skew"]
        yield Finding(
            YELLOW if skew > _MOST_SKEW else GREEN, "clocks", f"{skew:.2f} s apart at most", "start NTP on the nodes"
        )
    versions = {json.dumps(version, sort_keys=True) for version in told["versions"]}
    if len(versions) > 1:
        text = f"differ between nodes: {'; '.join(sorted(versions))}"
        yield Finding(RED, "versions", text, "one environment for all nodes, on a shared file system or in a container")


if __name__ == "__main__":
    run_command(main, __doc__)
