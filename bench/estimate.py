"""Compare estimates with measured memory and published step times: `python -m bench.estimate`.

    out=FILE      where the tables go
    memory=false  only the published step times, which take a moment

Memory: the peak bytes of live tensors in a step, on ranks of this machine (CPU, gloo), against
`launch.estimate.counts.peak_bytes`; and the FLOPs that torch counts in matrix products against `flops_per_token` without
attention, which torch does not count on a CPU. The measurement counts every tensor that an operation returns, each storage
once, from its allocation until it is freed.

Step times: published runs on H100s against `launch.estimate.step_time`, whose three constants are fitted to them.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from typing import Any

from bench.records import claim_record
from bench.train import machine
from conf.cluster_schema import HardwareConfig
from conf.load import load
from conf.schema import Config, FFNConfig, ParallelConfig
from conf.shape import FFNShape, Shape, shape_of
from kernels.common.commands import run_command
from kernels.common.files import atomic_write
from kernels.common.options import read_options
from kernels.formula import parse
from launch.estimate.counts import (
    CONVENTION,
    attention_recomputed_flops,
    ffn_recomputed_flops,
    flops_per_token,
    peak_bytes,
    score_flops_per_token,
)
from launch.estimate.step_time import (
    FP8_EFFICIENCY,
    GEMM_EFFICIENCY,
    NETWORK_EFFICIENCY,
    ParallelLayout,
    model_flops_utilization,
    step_time,
)
from launch.ranks import Ranks

_MODEL = [
    "model=nano",
    "model.d_model=512",
    "model.n_layers=4",
    "model.n_heads=8",
    "model.d_ff=1408",
    "model.attention=sdpa",
    "sequence_length=512",
    "tokenizer.vocab_size=8192",
    "micro_batch_size=4",
    "telemetry_every=0",
    "logger=none",
    "steps=3",
    "++zero.bucket_elements=1000000",  # of no effect at stage 0
]
# Arms, tensor and context sizes, ZeRO stages, checkpointing, one or two micro-batches; two ranks each.
_MEASURED = """
ffn=swiglu zero=1 precision=bf16 global_batch_size=8
ffn=gelu zero=1 precision=bf16 global_batch_size=16
ffn=swiglu zero=2 precision=bf16 global_batch_size=8 model.activation_checkpointing=true
ffn=relu2 zero=3 precision=bf16 global_batch_size=8
ffn=geglu zero=1 precision=fp32 global_batch_size=4 parallel.tensor=2
ffn=swiglu zero=1 precision=bf16 global_batch_size=4 parallel.tensor=2 parallel.sequence=true
ffn=relu zero=0 precision=fp32 global_batch_size=8
ffn=swiglu zero=3 precision=fp32 global_batch_size=8 model.activation_checkpointing=true
ffn=swiglu zero=2 precision=fp32 global_batch_size=4 parallel.context=2
ffn=swiglu zero=2 precision=fp32 global_batch_size=8 model.activation_checkpointing=attention
ffn=swiglu zero=1 precision=fp32 global_batch_size=4 parallel.tensor=2 model.activation_checkpointing=selective
"""


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        from bench.ranks import as_rank

        as_rank(lambda ranks: _measured(ranks, argv[1:]))
    options = read_options(argv, {"out": "bench/results/estimate.md", "memory": True})
    claim_record(options["out"], argv)
    text = "# Estimates against measured memory and published step times (`python -m bench.estimate`)\n"
    text += _memory_table() if options["memory"] else ""
    text += _time_table()
    print(text)
    with atomic_write(options["out"]) as file:
        file.write(text)


# ------------------------------------------------------------------------------------------------------------- memory


def _memory_table() -> str:
    from bench.ranks import on_ranks

    lines = [
        f"\n## Memory and FLOPs ({machine()}, 2 ranks)\n",
        "Peak MiB of live tensors in a step, against `peak_bytes`; FLOPs per token of the matrix products, recomputed ones",
        "included, as torch counts them and by `flops_per_token` (torch does not count attention on a CPU).\n",
        f"`{' '.join(_MODEL)}`, and\n",
        "| configuration | measured | estimate | off by | FLOPs counted | FLOPs estimated |",
        "|---|---|---|---|---|---|",
    ]
    for row in _MEASURED.strip().splitlines():
        measured = on_ranks(2, "bench.estimate", [*_MODEL, *row.split()])[0]
        config = load([*_MODEL, *row.split()])
        flops = _products(config)
        lines.append(
            f"| {row} | {measured['peak'] / 2**20:.1f} | {measured['estimate'] / 2**20:.1f} | "
            f"{measured['estimate'] / measured['peak'] - 1:+.1%} | "
            f"{measured['flops'] * config.parallel.tensor:,.0f} | {flops:,} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def _products(config: Config) -> int:
    """Return the FLOPs per token of all matrix products of a step, recomputed ones included, without attention's."""
    shape = shape_of(config)
    flops = flops_per_token(shape, config.sequence_length)
    layers = flops["attention"] - score_flops_per_token(shape, config.sequence_length) + flops["ffn"]
    total = layers + flops["output"] + ffn_recomputed_flops(shape)
    if config.model.activation_checkpointing is True:
        return total + layers // 3
    if config.model.activation_checkpointing:
        again = attention_recomputed_flops(shape, config.sequence_length)
        total += again - score_flops_per_token(shape, config.sequence_length) // 3
    return total


def _measured(ranks: Ranks, overrides: list[str]) -> dict[str, float]:
    """Return the peak bytes of live tensors in a step, their estimate, and the FLOPs per token that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    from bench.memory import alive
    from bench.ranks import engine_of, random_tokens

    before = alive()
    engine, batch, shape = engine_of(overrides, ranks)
    config = engine.config
    tokens = random_tokens(batch, shape, config.sequence_length, ranks.rank)
    for _ in range(2):  # the optimizer's state exists from the first step on
        engine.train_step(tokens, 1.0)
    gc.collect()
    kept = {address: size for address, size in alive().items() if address not in before}
    with live_tensors()(set(kept)) as live:
        engine.train_step(tokens, 1.0)
    with FlopCounterMode(display=False) as counter:
        engine.train_step(tokens, 1.0)
    tokens_per_rank = batch.micro_batch * batch.accumulation * config.sequence_length // config.parallel.context
    bf16 = config.precision.name == "bf16"
    estimate = peak_bytes(config, shape, engine.mesh.data_context.size, batch.micro_batch, batch.accumulation, bf16)
    return {
        "peak": sum(kept.values()) + live.peak,
        "estimate": sum(estimate.values()),
        "flops": counter.get_total_flops() / tokens_per_rank,
    }


def live_tensors() -> type:
    """Return the context manager that counts the bytes of new storages; a function, because it imports torch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class LiveTensors(TorchDispatchMode):
        """`live` has the bytes of the new storages that are alive, `peak` their maximum."""

        def __init__(self, known: set[int]) -> None:
            super().__init__()
            self.live = self.peak = 0
            self._known = known

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, self._count, out)
            return out

        def _count(self, tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in self._known:
                self._known.add(address)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, address, size)
            return tensor

        def _freed(self, address: int, size: int) -> None:
            self._known.discard(address)
            self.live -= size

    return LiveTensors


# ---------------------------------------------------------------------------------------------------------- step times


@dataclasses.dataclass(frozen=True)
class Published:
    """A published run: `value` is its MFU, or tokens/s per GPU if above 1."""

    name: str
    layout: ParallelLayout
    hardware: HardwareConfig
    value: float

    def predicted(self, efficiency: float = GEMM_EFFICIENCY, network: float = NETWORK_EFFICIENCY) -> float:
        """Return the estimate of `value`."""
        seconds = step_time(self.layout, self.hardware, efficiency, network).total
        if self.value > 1:
            return self.layout.tokens / seconds / self.layout.gpus
        return model_flops_utilization(self.layout, self.hardware, seconds, causal=False)

    def mfu_as_counted_here(self) -> float:
        """Return the MFU of the published figure by `flops_per_token`."""
        layout, peak = self.layout, self.hardware.bf16_flops
        if self.value > 1:
            return self.value * sum(flops_per_token(layout.shape, layout.sequence_length).values()) / peak
        here, there = (model_flops_utilization(layout, self.hardware, 1.0, causal) for causal in (True, False))
        return self.value * here / there


def published() -> list[Published]:
    """Return the published runs as their sources describe them; `_SOURCES` lists what is assumed."""
    h100 = HardwareConfig(device="H100 SXM", bf16_flops=989.4e12, fp8_flops=1979e12)
    # 96 GB of HBM2e, and a limit of 500 W.
    torchtitan = dataclasses.replace(h100, memory_bandwidth=2.4e12, watts=500)
    fsdp = {"gpus_per_node": 8, "stage": 3, "overlap": 1.0, "overlap_weights": True}
    mpt = {**fsdp, "sequence_length": 2048, "gradient_width": 2}
    sizes = {"7B": (4096, 32, 32), "30B": (7168, 48, 56), "70B": (8192, 80, 64)}
    rows = [  # size, GPUs, micro-batch, recomputed fraction, MFU
        ("7B", 8, 6, 0, 0.4644),
        ("7B", 128, 6, 0, 0.4571),
        ("7B", 512, 6, 0, 0.422),
        ("30B", 128, 8, 1, 0.4185),
        ("70B", 512, 8, 1, 0.4125),
    ]
    runs = [
        Published(
            f"MPT {size}, {gpus} GPUs, MFU",
            ParallelLayout(_gpt(*sizes[size], 50432), gpus=gpus, micro_batch=micro, recompute=recompute, **mpt),
            h100,
            value,
        )
        for size, gpus, micro, recompute, value in rows
    ]
    llama = shape_of(load(["model=llama3_8b", "ffn=swiglu"]))
    for gpus, value in ((8, 6667.0), (128, 6514.0)):
        layout = ParallelLayout(llama, 8192, gpus, micro_batch=2, recompute=0.5, **fsdp)
        runs.append(Published(f"torchtitan Llama 3.1 8B, {gpus} GPUs, tokens/s per GPU", layout, torchtitan, value))
    for gpus, value in ((8, 8532.0), (128, 8380.0)):
        layout = ParallelLayout(llama, 8192, gpus, micro_batch=2, recompute=0.5, fp8=True, **fsdp)
        runs.append(
            Published(f"torchtitan Llama 3.1 8B in FP8, {gpus} GPUs, tokens/s per GPU", layout, torchtitan, value)
        )
    gpt = ParallelLayout(
        _gpt(12288, 96, 96, 131072),
        4096,
        0,
        8,
        ParallelConfig(tensor=4, sequence=True),
        overlap=1.0,
        overlap_weights=True,
        pipeline=8,
        interleaved=6,
    )
    for gpus, value in ((96, 0.47), (4608, 0.42)):
        layout = dataclasses.replace(gpt, gpus=gpus, micro_batches=1152 * gpt.parallel.tensor * gpt.pipeline // gpus)
        runs.append(Published(f"Megatron-LM GPT-3 175B, {gpus} GPUs, MFU", layout, h100, value))
    return runs


def _gpt(d_model: int, layers: int, heads: int, vocabulary: int) -> Shape:
    arm = FFNConfig(name="gelu", formula="gelu(x)")
    layer = FFNShape(arm, parse(arm.formula), 4 * d_model)
    return Shape(d_model, layers, heads, heads, d_model // heads, (layer,) * layers, vocabulary, True, False)


def _time_table() -> str:
    lines = [
        "\n## Step times on H100s\n",
        f"Fitted to these rows: matrix products at {GEMM_EFFICIENCY:g} of peak, in FP8 at {FP8_EFFICIENCY:g} of its own, and",
        f"collectives at {NETWORK_EFFICIENCY:g} of the data sheet's rate. MFU counts attention's full square and the",
        "embedding, as the sources do; beside it, what",
        f"the published figure is by the convention of this project ({CONVENTION}). `without latency`: how",
        "far off the model would be if a hop in a ring took no time; it takes 2 µs, a common value, not fitted.\n",
        "| run | published | MFU as counted here | model | off by | without latency |",
        "|---|---|---|---|---|---|",
    ]
    for run in published():
        estimate = run.predicted()
        no_latency = dataclasses.replace(run.hardware, network_latency=0.0)
        without = dataclasses.replace(run, hardware=no_latency).predicted()
        form = ",.0f" if run.value > 1 else ".1%"
        counted = f"{run.mfu_as_counted_here():.1%}"
        figures = f"{run.value:{form}} | {counted} | {estimate:{form}} | {estimate / run.value - 1:+.1%}"
        lines.append(f"| {run.name} | {figures} | {without / run.value - 1:+.1%} |")
    return "\n".join(lines) + "\n\n" + _SOURCES


_SOURCES = """\
Sources: MPT, MosaicML's llm-foundry benchmark tables (H100 80GB, bf16, sequences of 2048, FSDP fully sharded, batch per GPU 6
and 8; 30B and 70B with every layer recomputed); torchtitan, its H100 benchmarks of December 2024 (H100 with HBM2e and a limit
of 500 W, batch per GPU 2 x 8192, FSDP, compiled; selective checkpointing is assumed to recompute half of the products);
Megatron-LM, the strong scaling of its README (1152 sequences of 4096 per step).

Assumed where a source is silent: Megatron-LM at tensor 4, pipeline 8, interleaved 6, micro-batch 1; the batch per GPU of MPT
7B on 128 and 512 is that on 8. A GPU limited to 500 W of 700 runs at the cube root of that. FSDP and Megatron-LM overlap
their communication with compute; DeepSpeed does not unless `zero.overlap=true`.

This page has no run of this codebase on a GPU: none was available.
"""


if __name__ == "__main__":
    run_command(main, __doc__)
