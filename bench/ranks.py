"""Run a measurement on several ranks of this machine: `on_ranks` starts them, and each of them calls `as_rank`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from conf.load import load
from conf.shape import Shape, check_divisibility, shape_of
from conf.validate import Batch, validate
from kernels.common.errors import UserError
from launch.ranks import Ranks, find_ranks, leave
from model.attention import choose


def on_ranks(world: int, module: str, arguments: list[str], timeout: float = 600.0, threads: int = 1) -> list[Any]:
    """Run `python -m MODULE --rank ARGUMENTS` as ranks of one group; return the last line of each, parsed as JSON.

    Raises:
        UserError: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        environment = (
            os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
        )
        command = [sys.executable, "-m", module, "--rank", *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            if process.returncode:
                raise UserError(f"{module} failed on a rank:\n{err[-2000:]}")
            results.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def as_rank(measure: Callable[[Ranks], Any]) -> NoReturn:
    """Call `measure` in the process group of `on_ranks`, print its result as JSON, and exit."""
    from training.process_group import start_process_group

    ranks = find_ranks()
    start_process_group(ranks, torch.device("cpu"), 10.0)
    result = measure(ranks)
    dist.barrier()
    print(json.dumps(result))
    leave(0)


def engine_of(overrides: list[str], ranks: Ranks) -> tuple[Any, Batch, Shape]:
    """Build the engine of a configuration, with a vocabulary of `tokenizer.vocab_size`; reads no corpus."""
    from training import machine
    from training.engine import Engine, mesh_from_config

    config = load(overrides)
    batch = validate(config, ranks.world_size)
    shape = shape_of(config)
    check_divisibility(shape, config.parallel)
    device = machine.find_device(ranks)
    dtype = machine.find_dtype(config, device)
    attention = choose(config.model.attention, device, dtype, config.sequence_length).backend
    mesh = mesh_from_config(config.parallel)
    return Engine(config, batch, shape, device, dtype, attention, None, mesh), batch, shape


def random_tokens(batch: Batch, shape: Shape, length: int, seed: int) -> torch.Tensor:
    """Return (sequences per data rank, length + 1) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    sequences = batch.global_batch // batch.data_parallel
    return torch.randint(shape.vocab_size, (sequences, length + 1), generator=generator)
