"""Compare patched Transformers models with unpatched ones, in error, memory and step time: `python -m bench.patch`.

    tokens=128    of the timed layers
    d_model=1024  of the timed layers
    d_ff=2816     of the timed layers
    rounds=7      of the timings, in which each contender takes a turn
    out=FILE      where the page goes

Errors are those of tiny models with random weights against the same weights in float64. A step is forward and backward of one
feed-forward layer, or of a two-layer model, on one core; what is counted is the processor's time, which other programs on the
machine disturb less than the clock's. Beside a layer stands what its matrix products alone take, without allocations: fusion
gains no more than the rest.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.contenders import projection_products
from bench.records import claim_record
from bench.tiny_models import error, in_three_ways, kept_bytes, logits_and_gradients, mlps, tiny, tokens
from bench.train import machine
from kernels.common.commands import run_command
from kernels.common.files import print_and_write
from kernels.common.options import read_options
from kernels.huggingface import patch
from kernels.mlp import BF16_ON_CPU

MODELS = ("Llama", "Qwen3", "Gemma 3", "Phi-3", "Arcee", "Apertus")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def main(argv: list[str]) -> None:
    defaults = {"tokens": 128, "d_model": 1024, "d_ff": 2816, "rounds": 7, "out": "bench/results/cpu-patch.md"}
    options = read_options(argv, defaults, minimum={"tokens": 1, "d_model": 64, "d_ff": 64, "rounds": 3})
    claim_record(options["out"], argv)
    torch.set_num_threads(1)
    print_and_write(_page(options), options["out"])


def _page(options: dict[str, Any]) -> Iterator[str]:
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    yield f"# Patched models of Transformers beside unpatched ones ({machine()}; {versions}; `python -m bench.patch`)"
    yield ""
    yield "## Error"
    yield ""
    yield "Of tiny models (two layers, d_model 64, d_ff 160, 384 tokens) against the same weights in float64: the error of the"
    yield "patched model over the error of the unpatched one. Of gradients, the root mean square over the parameters."
    yield ""
    yield "| model | dtype | logits | gradients of the layers | other gradients |"
    yield "|---|---|---|---|---|"
    for name in MODELS:
        for dtype, label in DTYPES.items():
            yield f"| {name} | {label} |" + "".join(f" {ratio:.3f} |" for ratio in _error_ratios(name, dtype))
    yield ""
    yield "## Kept for backward"
    yield ""
    yield "Of one feed-forward layer in bf16, each storage once, parameters not counted, in units of tokens x d_ff elements."
    yield "The width of x is d_model, here 64 of 160: its part shrinks with d_ff / d_model."
    yield ""
    yield "| model | unpatched | patched | ratio | unpatched with x | patched with x | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for name in MODELS:
        yield f"| {name} |" + "".join(f" {value:.2f} |" for value in _kept(name))
    yield ""
    yield "## Step time"
    yield ""
    yield f"Forward and backward, {options['tokens']} tokens, d_ff {options['d_ff']}, one thread, ms of processor time."
    yield f"{options['rounds']} rounds, in which each takes a turn. Ratio: unpatched over patched, median (range over rounds)."
    yield ""
    yield "| what | dtype | unpatched, ms | patched, ms | ratio | matrix products alone, ms |"
    yield "|---|---|---|---|---|---|"
    for label, dtype, steps in _contenders(options):
        before, after, *products = _seconds(steps, options["rounds"])
        ratios = [a / b for a, b in zip(before, after, strict=True)]
        alone = f"{1e3 * statistics.median(products[0]):.1f}" if products else "–"
        yield (
            f"| {label} | {DTYPES[dtype]} | {1e3 * statistics.median(before):.1f} | {1e3 * statistics.median(after):.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {alone} |"
        )
    if not BF16_ON_CPU:
        yield ""
        yield "This CPU has no bf16 matrix instructions. There PyTorch computes bf16 products element by element, and the"
        yield "patched layer computes them in fp32 with one rounding at the end: most of the bf16 ratios is that. The fp32 rows"
        yield "show what fusion alone gives where products take nearly all of the time."


def _error_ratios(name: str, dtype: torch.dtype) -> list[float]:
    exact, unpatched, patched = in_three_ways(name, dtype)
    own = [key for key in exact if ".mlp." in key and exact[key].numel() > 1]
    others = [key for key in exact if key not in own and key != "logits" and exact[key].numel() > 1]
    return [error(patched, exact, keys) / error(unpatched, exact, keys) for keys in (["logits"], own, others)]


def _kept(name: str) -> list[float]:
    model, x = tiny(name).bfloat16(), torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    before = kept_bytes(mlps(model)[0], x)
    patch(model)
    after, unit = kept_bytes(mlps(model)[0], x), 2 * 512 * 160
    pairs = ((b / unit, a / unit, a / b) for b, a in zip(before, after, strict=True))
    return [value for pair in pairs for value in pair]


Step = Callable[[], Any]


def _contenders(options: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, list[Step]]]:
    """Return what is timed: a name, a dtype, and a step unpatched, patched, and of the products of a layer alone."""
    width = {"hidden_size": options["d_model"], "intermediate_size": options["d_ff"], "num_attention_heads": 8}
    for name in ("Llama", "Phi-3", "Arcee", "Apertus"):
        for dtype in DTYPES:
            layer = mlps(tiny(name, num_hidden_layers=1, **width))[0].to(dtype)
            x = torch.randn(options["tokens"], options["d_model"], dtype=dtype)
            steps = [*_pair(layer, _layer_step, x), _products(layer, x)]
            yield f"layer of {name}, d_model {options['d_model']}", dtype, steps
    for dtype in DTYPES:
        model = tiny("Llama", vocab_size=1024, **width).to(dtype)
        ids = tokens(1, options["tokens"])
        yield (
            f"Llama of two layers, d_model {options['d_model']}, vocabulary 1024",
            dtype,
            _pair(model, _model_step, ids),
        )


def _pair(module: nn.Module, step: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Step]:
    patched = copy.deepcopy(module)
    patch(patched)
    return [lambda: step(module, x), lambda: step(patched, x)]


def _products(layer: nn.Module, x: Tensor) -> Step:
    """Return the matrix products of a layer's projections, forward and backward, for as many tokens as x (T, d_model)."""
    weights = [module.weight.detach() for module in layer.modules() if isinstance(module, nn.Linear)]
    operands = [(x.new_ones(len(x), w.shape[1]), w, x.new_ones(len(x), w.shape[0])) for w in weights]
    results = [[torch.empty_like(tensor) for tensor in (gradient, x, w)] for x, w, gradient in operands]

    def step() -> None:
        for inputs, out in zip(operands, results, strict=True):
            projection_products(*inputs, out)

    return step


def _layer_step(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    y = layer(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))


def _model_step(model: nn.Module, ids: Tensor) -> None:
    logits_and_gradients(model, model, ids)


def _seconds(steps: list[Step], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, times in zip(steps, seconds, strict=True):
            start = time.process_time()
            step()
            if number:  # the first builds kernels and touches memory
                times.append(time.process_time() - start)
    print(f"  {rounds} rounds", file=sys.stderr, flush=True)
    return seconds


if __name__ == "__main__":
    run_command(main, __doc__)
