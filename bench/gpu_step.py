"""Whole training steps on one GPU, and what they are made of; `bench/gpu.py` runs it first.

The decoder is trained by a plain loop with AdamW on bf16 weights, so that nothing is needed but torch and Triton. Its peak
memory is compared with the estimate of its activations, its speed with the peak of the data sheet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_timing import seconds_of
from conf.schema import Config, FFNConfig, ModelConfig
from conf.shape import FFNShape, Shape
from kernels import parse
from kernels.cross_entropy.linear import linear_cross_entropy
from launch.estimate.counts import activation_bytes, flops_per_token, parameters
from model.attention import Documents, attend
from model.decoder import Decoder
from model.flash_attention import find_flash_attention
from training.peak_speed import peak_flops
from training.profiler import seconds_by_part

_WARM_UP, _STEPS, _PROFILED = 3, 10, 3
_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with swiglu, and the sequences that are trained on."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab_size: int
    sequences: int
    length: int

    @property
    def shape(self) -> Shape:
        """The resolved shape."""
        arm = FFNConfig()
        layer = FFNShape(arm, parse(arm.formula), self.d_ff)
        heads = (self.n_heads, self.n_kv_heads, self.d_model // self.n_heads)
        return Shape(self.d_model, self.n_layers, *heads, (layer,) * self.n_layers, self.vocab_size, False, False)


MODELS = (
    Model("llama_1b", 2048, 22, 32, 4, 5632, 32000, 8, 2048),
    Model("llama3_8b, 8 of 32 layers", 4096, 8, 32, 8, 14336, 128256, 1, 8192),
)
TINY = Model("tiny", 32, 2, 4, 2, 48, 64, 2, 16)


def train(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the speed of training steps, their losses, and the peak memory beside its estimate."""
    shape, settings = model.shape, ModelConfig()
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    with device:
        decoder = Decoder(shape, settings, "sdpa" if on_gpu else "blocks").to(dtype)
        tokens = torch.randint(model.vocab_size, (model.sequences, model.length + 1))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, model.d_model**-0.5) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
    losses: list[Tensor] = []

    def step() -> None:
        objective, *_ = decoder(tokens[:, :-1], tokens[:, 1:])
        objective.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay, so that the peak is that of activations
        losses.append(objective.detach())

    for _ in range(_WARM_UP):
        step()
    wait(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(_STEPS if on_gpu else 2):
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
    count, per_step = tokens[:, 1:].numel(), statistics.median(seconds)
    peak, source = peak_flops(device, dtype)
    needs = activation_bytes(shape, Config().parallel, count, dtype.itemsize, on_gpu=on_gpu)
    flops = sum(flops_per_token(shape, model.length).values()) * count
    return {
        "model": model.name,
        "parameters": sum(parameters(shape).values()),
        "tokens": count,
        "seconds": [per_step, min(seconds), max(seconds)],
        "tokens_per_second": count / per_step,
        "mfu": flops / per_step / peak,
        "peak": source,
        "losses": [float(loss) for loss in losses],
        "activations_gib": (torch.cuda.max_memory_allocated(device) - before) / 2**30 if on_gpu else None,
        "estimate_gib": (needs["layers"] + max(needs["loss"], needs["head"], needs["output"] + needs["backward"]))
        / 2**30,
        "parts": profiled(step, device),
    }


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the seconds per step of each part, from PyTorch's profiler."""
    on_gpu, count = device.type == "cuda", _PROFILED if device.type == "cuda" else 1
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    wait(device)
    with torch.profiler.profile(activities=kinds) as profile:
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait(device)
        wall = time.perf_counter() - began
    parts = seconds_by_part(profile.events() or [], wall, on_gpu)
    return {name: seconds / count for name, seconds in parts.items() if seconds}


def wait(device: torch.device) -> None:
    """Wait until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Return [median, minimum, maximum] of the seconds of a call: on a GPU its own time (`seconds_of`)."""
    call()
    call()
    seconds = [seconds_of(call, 1, device) for _ in range(rounds)]
    return [statistics.median(seconds), min(seconds), max(seconds)]


def attempted(
    row: dict[str, Any], part: Callable[..., Any], *arguments: Any, expected: Any = ()
) -> Iterator[dict[str, Any]]:
    """Yield the row that a part returns, or the rows that it yields; one that raises ends in `row`, with the reason.

    Triton's errors, of a kernel that does not compile or that needs more shared memory than there is, share no base with those
    of torch but Exception.

    Args:
        expected: types of errors that say what does not run here; any other is a failure of the run, with `crashed`.
    """
    try:
        found = part(*arguments)
        yield from [found] if isinstance(found, dict) else found
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield row | {"failed": reason} | ({} if isinstance(error, expected) else {"crashed": True})


def free_memory(device: torch.device) -> None:
    """Give memory that is not in use back to a GPU."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a failed kernel every call fails: the parts say so
            torch.cuda.empty_cache()


def tried(
    model: Model, methods: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield the time of forward and backward of each method and the peak memory, or why it does not run here."""

    def one(row: dict[str, Any], method: Callable[[], Tensor]) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(lambda: method().sum().backward(), device, rounds)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return row | {"seconds": seconds, "peak_gib": peak}

    for name, method in methods.items():
        row = {"model": model.name, "method": name}
        # Expected: no kernel for these sizes, none in this build, or out of memory.
        yield from attempted(row, one, row, method, expected=RuntimeError)


def attention_choices(model: Model, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of forward and backward of each attention that runs here, at a model's sizes."""
    width, group = model.d_model // model.n_heads, (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    q, k, v = (
        torch.randn(model.sequences, model.length, heads, width, device=device, dtype=dtype).requires_grad_()
        for heads in group
    )
    starts = torch.zeros(model.sequences, model.length, dtype=torch.long, device=device)
    step = max(1, model.length // 8)
    starts[:, ::step] = 1  # eight documents
    lengths = [min(step, model.length - start) for start in range(0, model.length, step)]
    documents = Documents(starts.cumsum(1))
    on_gpu = device.type == "cuda"

    def by_kernel(kernel: SDPBackend) -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    methods: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: attend(q, k, v, "sdpa")}
    methods["sdpa, documents"] = lambda: attend(q, k, v, "sdpa", documents)
    if on_gpu:
        methods |= {f"sdpa, {name}": lambda kernel=kernel: by_kernel(kernel) for name, kernel in _KERNELS.items()}
        package, _ = find_flash_attention(torch.cuda.get_device_capability(device))
        if package is not None:
            methods[package.module] = lambda: attend(q, k, v, "flash")
            methods[f"{package.module}, documents"] = lambda: attend(q, k, v, "flash", documents)
    else:
        methods["blocks"] = lambda: attend(q, k, v, "blocks")
    # Causal, 2 products forward and 5 backward; tokens attend within their own document.
    unit = 3.5 * 2 * model.sequences * model.d_model
    for row in tried(model, methods, device, rounds):
        pairs = sum(length**2 for length in (lengths if "documents" in row["method"] else [model.length]))
        yield row | ({"flops_per_second": unit * pairs / row["seconds"][0]} if "seconds" in row else {})


def loss_chunks(model: Model, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of the loss, forward and backward, for several chunks, and of PyTorch's own function."""
    count = model.sequences * model.length
    hidden, weight = (
        torch.randn(n, model.d_model, device=device, dtype=dtype).requires_grad_() for n in (count, model.vocab_size)
    )
    targets = torch.randint(model.vocab_size, (count,), device=device)
    chunks = [rows for rows in (512, 2048, 4096, 8192, 16384) if rows < count] or [count]
    methods: dict[str, Callable[[], Tensor]] = {}
    for rows in chunks:
        methods[f"chunks of {rows}"] = functools.partial(linear_cross_entropy, hidden, weight, targets, chunk=rows)
    if hasattr(F, "linear_cross_entropy"):
        methods["torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, targets)
    methods["plain PyTorch"] = lambda: F.cross_entropy((hidden @ weight.t()).float(), targets)
    yield from tried(model, methods, device, rounds)
