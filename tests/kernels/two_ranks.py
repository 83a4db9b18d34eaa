"""The gradients of a patched model on two ranks, under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.tiny_models import logits_and_gradients, tiny, tokens
from kernels.huggingface import patch

RANK_KINDS = ("ddp", "fsdp", "fsdp of each mlp")


def on_a_rank(rank: int, folder: str) -> None:
    """Compute the gradients of patched models whose batch two ranks share; rank 0 writes them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    half = tokens().chunk(2)[rank]
    for kind in RANK_KINDS:
        model: Any = tiny("Llama")
        patch(model)
        run = model
        if kind == "ddp":
            run = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                if kind == "fsdp of each mlp":
                    fully_shard(layer.mlp)
                fully_shard(layer)
            fully_shard(model)
        for _ in range(2):  # the second time, parameters were resharded before
            results = logits_and_gradients(run, model, half)
        assert len(patch(model)) == 2  # a layer that was sharded can be patched too
        if rank == 0:
            torch.save(results, Path(folder) / kind)
    dist.destroy_process_group()


def expected_on_ranks() -> dict[str, Tensor]:
    """Return what the unpatched model gives for the whole batch, and rank 0's logits."""
    model = tiny("Llama")
    results = logits_and_gradients(model, model, tokens())
    results["logits"] = results["logits"].chunk(2)[0]
    return results
