"""Count what one training step launches on a GPU, without one: `python -m bench.launches [model=llama_1b KEY=VALUE ...]`.

    ranks=8      data-parallel ranks, of a process group that sends nothing

Forward and backward of a micro-batch run on tensors without data, with the code paths of a Hopper GPU in bf16, and every
operation that reaches a kernel is recorded: its kind, its name, the bytes of the tensors that it reads and writes (one that is
overwritten in place counts once), new tensors, and whether the host has to wait for the GPU. What DeepSpeed and the optimizer
add is counted on a CPU, with a model of the same depth and narrow layers: operations only, not their bytes.

Without arguments it counts three presets and writes bench/results/launches.json and .md. No time is measured. An operation of
PyTorch counts as one launch; attention's backward and an optimizer step over many tensors take more.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.load import load
from conf.overrides import check_overrides
from conf.schema import Config
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.options import split_options
from kernels.tensors import meta_as_gpu
from model.decoder import Decoder
from model.products import products_of

RESULTS = Path(__file__).parent / "results"
PRESETS = ("llama_60m", "llama_1b", "llama3_8b")
HOPPER = (9, 0)
KINDS = ("GEMM", "attention", "activation", "norm", "rotary", "loss", "other")
_GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_mm")
# Operations that launch nothing: they make no tensor, or one without content.
_FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::lift", "prim::")
# Operations whose result the host needs at once.
_SYNCHRONISING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique")
_OF_FILES = {"norm": "norm", "rotary": "rotary", "cross_entropy": "loss", "rounding": "rounding"}


@dataclasses.dataclass
class Counts:
    """What was launched."""

    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by kind
    bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by kind
    names: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by name of the operation
    allocations: int = 0
    synchronisations: int = 0

    def add(self, kind: str, name: str, size: int) -> None:
        self.launches[kind] += 1
        self.bytes[kind] += size
        self.names[f"{kind}: {name}"] += 1


class Recorder(TorchDispatchMode):
    """Counts operations while it is entered, and Triton kernels in place of launching them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._within: list[str] = []  # kinds of what is being computed, innermost last

    @contextlib.contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """Count what is launched inside as `kind`, GEMMs excepted."""
        self._within.append(kind)
        try:
            yield
        finally:
            self._within.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if any(name.startswith(each) for each in _SYNCHRONISING):
            self.counts.synchronisations += 1
        given, results = (
            [each for each in tree_leaves(tree) if isinstance(each, Tensor)] for tree in ((args, kwargs or {}), out)
        )
        mutates = function._schema.is_mutable
        is_view = not mutates and any(each.alias_info is not None for each in function._schema.returns)
        fresh = [] if is_view or mutates else results
        self.counts.allocations += len(fresh)
        if is_view or not results or name.startswith(_FREE):
            return out
        kind = "GEMM" if name in _GEMMS else self._within[-1] if self._within else "other"
        self.counts.add(kind, name.removeprefix("aten::"), _bytes([*given, *fresh]))
        return out

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """Record a Triton kernel; takes the place of `JITFunction.run`."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        folder = Path(kernel.fn.__code__.co_filename).parent.name
        self.counts.add(_OF_FILES.get(folder, "activation"), f"{kernel.fn.__name__} (Triton)", _bytes(tensors))


def _bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors, each counted once; of an expanded one, those that are stored."""
    unique = {(each.untyped_storage()._cdata, each.storage_offset(), each.shape): each for each in tensors}
    return sum(
        each.element_size() * math.prod(n for n, stride in zip(each.shape, each.stride(), strict=True) if stride)
        for each in unique.values()
    )


class _Attention(torch.autograd.Function):
    """Stands for a fused attention: one launch forward and one backward."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.recorder = recorder
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # as the kernels lay it out
        recorder.counts.add("attention", "forward", _bytes([q, k, v, out]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        q, k, v = ctx.saved_tensors
        gradients = [torch.empty_like(each) for each in (q, k, v)]
        ctx.recorder.counts.add("attention", "backward", _bytes([q, k, v, q.new_empty(q.shape), grad, *gradients]))
        return None, *gradients


@contextlib.contextmanager
def traced_gpu(capability: tuple[int, int] = HOPPER) -> Iterator[Recorder]:
    """Record what tensors on the meta device would launch on a GPU, and launch nothing."""
    from triton.runtime.jit import JITFunction

    recorder = Recorder()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001 (the method's signature)
        recorder.launch(kernel, *args, **kwargs)

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return _Attention.apply(recorder, q, k, v)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        meta_as_gpu(capability),
        recorder,
    ):
        yield recorder


def count_micro_batch(config: Config) -> Counts:
    """Return what forward and backward of one micro-batch launch in bf16, or with `precision=fp8`."""
    batch, shape = validate(config, 8), shape_of(config)
    products, _ = products_of(config.precision, torch.device("cuda"), HOPPER)
    with torch.device("meta"):
        decoder = Decoder(shape, config.model, "sdpa", products=products).to(torch.bfloat16).train()
        tokens = torch.empty(batch.micro_batch, config.sequence_length + 1, dtype=torch.int64)
        decoder(tokens[:, :-1], tokens[:, 1:])  # makes what all steps share, as the rotary table
        with traced_gpu() as recorder, _loss_apart(recorder):
            objective, *_ = decoder(tokens[:, :-1], tokens[:, 1:])
            objective.backward()
    return recorder.counts


@contextlib.contextmanager
def _loss_apart(recorder: Recorder) -> Iterator[None]:
    """Count what the loss launches, beside its GEMMs, as the loss."""
    from model import decoder

    original = decoder.linear_cross_entropy

    def counted(*args: Any, **kwargs: Any) -> Any:
        with recorder.within("loss"):
            return original(*args, **kwargs)

    with mock.patch.object(decoder, "linear_cross_entropy", counted):
        yield


def count_optimizer(config: Config, ranks: int) -> Counts:
    """Return what a step launches beside forward and backward: DeepSpeed's part and the optimizer's. Once per process.

    Args:
        config: of a model with the depth that counts; its layers are made narrow.
        ranks: data-parallel ranks, of which this process is the first; the others do not exist, and nothing is sent.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from training.engine import Engine, mesh_from_config

    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= names | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    narrow = copy.deepcopy(config)
    heads = narrow.model.n_heads // (narrow.model.n_kv_heads or narrow.model.n_heads)  # query heads per key head
    model = {
        "d_model": 16 * heads,
        "n_heads": heads,
        "n_kv_heads": 1,
        "head_dim": 16,
        "d_ff_gated": 32,
        "vocab_size": 64,
    }
    narrow.model = dataclasses.replace(narrow.model, **model)
    narrow.sequence_length, narrow.micro_batch_size = 16, 1
    narrow.global_batch_size = 2 * ranks if config.global_batch_size > ranks * (config.micro_batch_size or 1) else ranks
    batch, shape = validate(narrow, ranks), shape_of(narrow)
    cpu = torch.device("cpu")
    engine = Engine(narrow, batch, shape, cpu, torch.bfloat16, "sdpa", None, mesh_from_config(narrow.parallel))
    tokens = torch.zeros(batch.accumulation, narrow.sequence_length + 1, dtype=torch.int64)
    for _ in range(2):  # the first step makes the optimizer's state
        engine.train_step(tokens, 1.0)
    with Recorder() as step:
        engine.train_step(tokens, 1.0)
    decoder = Decoder(shape, narrow.model, "sdpa").to(torch.bfloat16).train()
    decoder(tokens[:1, :-1], tokens[:1, 1:])
    with Recorder() as plain:
        decoder(tokens[:1, :-1], tokens[:1, 1:])[0].backward()
    added, once = step.counts, plain.counts
    for name, number in once.names.items():
        added.names[name] -= batch.accumulation * number
    launches = {"collective": 0, "other": 0}
    for name, number in added.names.items():
        launches["collective" if "c10d::" in name else "other"] += number
    return Counts(
        launches=collections.Counter(launches),
        names=collections.Counter({name.split(": ")[1]: number for name, number in added.names.items() if number}),
        allocations=added.allocations - batch.accumulation * once.allocations,
        synchronisations=added.synchronisations - batch.accumulation * once.synchronisations,
    )


def as_json(counts: Counts) -> dict[str, Any]:
    """Return the counts as they are committed."""
    return {
        "launches": dict(counts.launches),
        "gigabytes": {kind: round(size / 1e9, 3) for kind, size in counts.bytes.items()},
        "new_tensors": counts.allocations,
        "synchronisations": counts.synchronisations,
        "names": dict(sorted(counts.names.items())),
    }


def _page(results: dict[str, Any]) -> str:
    """Return the table of all presets."""
    lines = [
        "# What a training step launches on a GPU\n",
        "Counted without a GPU by `python -m bench.launches`, whose docstring says how; no time was measured. A micro-batch,",
        "forward and backward, in bf16 on the code paths of Hopper: operations that reach a kernel / gigabytes that they read",
        "and write. `new tensors` are allocations of PyTorch's caching allocator, `waits` those of the host for the GPU.\n",
        f"| model | {' | '.join(KINDS)} | all | new tensors | waits |",
        "|---" * (len(KINDS) + 4) + "|",
    ]
    for name, result in results.items():
        micro = result["micro_batch"]
        cells = [f"{micro['launches'].get(kind, 0):,} / {micro['gigabytes'].get(kind, 0):.1f}" for kind in KINDS]
        total = f"{sum(micro['launches'].values()):,} / {sum(micro['gigabytes'].values()):.1f}"
        lines.append(
            f"| {name}, {result['tokens']:,} tokens | {' | '.join(cells)} | {total} | {micro['new_tensors']:,} | "
            f"{micro['synchronisations']} |"
        )
    lines += [
        "\nWhat DeepSpeed and the optimizer add per step:\n",
        "| model | operations | collectives | new tensors | waits |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        added = result["optimizer"]
        lines.append(
            f"| {name}, {result['setting']} | {added['launches']['other']:,} | {added['launches']['collective']} | "
            f"{added['new_tensors']:,} | {added['synchronisations']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    options, overrides = split_options(argv, {"ranks": 8}, {"ranks": 1})
    check_overrides(overrides, options)
    ranks = options["ranks"]
    if overrides:
        config = load([*overrides, "precision=bf16"])
        print(json.dumps(_count(config, ranks), indent=1))
        return 0
    results = {}
    for name in PRESETS:  # each in a process of its own: a process group cannot be replaced
        command = [sys.executable, "-m", "bench.launches", f"model={name}", f"ranks={ranks}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout[done.stdout.index("{\n") :])
    RESULTS.joinpath("launches.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    RESULTS.joinpath("launches.md").write_text(_page(results), encoding="utf-8")
    print(_page(results))
    return 0


def _count(config: Config, ranks: int) -> dict[str, Any]:
    batch = validate(config, ranks)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # DeepSpeed prints there
        micro, optimizer = count_micro_batch(config), count_optimizer(config, ranks)
    return {
        "tokens": batch.micro_batch * config.sequence_length,
        "setting": f"{ranks} ranks, ZeRO {config.zero.stage}, {batch.accumulation} micro-batch(es)",
        "micro_batch": as_json(micro),
        "optimizer": as_json(optimizer),
    }


if __name__ == "__main__":
    run_command(main, __doc__)
