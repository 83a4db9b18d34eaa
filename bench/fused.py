"""Compare the fused RMSNorm and rotary embedding with plain PyTorch: `python -m bench.fused`.

    device=cpu  or cuda
    rounds=15   timings of each
    only=TEXT   operations with TEXT in their name

Both run in one process, taking turns, under the allocator settings of `train.py`. A ratio is taken per round: the time of plain
PyTorch divided by ours. On a CPU, plain PyTorch is the few passes that run where there is no compiler (`norm.PLAIN`); on a GPU
it is `F.rms_norm`, and times are the GPU's own (`bench/gpu_timing.py`). The error is that of all results together against
float64, divided by plain PyTorch's.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_timing import seconds_of
from kernels.common.commands import run_command
from kernels.common.options import read_options
from kernels.norm import norm
from kernels.rotary import rotary

EPS = 1e-5
_WARM_UP = 3
_ELEMENTS = 2**22  # of one timing: small tensors are computed several times
_GPU_CALLS = 20  # at least, on a GPU: its events resolve half a microsecond, and the smallest norm takes about one


def plain_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what `rms_norm` returns, by plain PyTorch."""
    s = x if residual is None else x + residual
    if x.is_cuda or x.dtype == torch.float64:
        return F.rms_norm(s, weight.shape, weight, EPS), s
    return norm._RMSNorm.apply(norm.PLAIN, s, None, weight, EPS), s


def plain_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `rotate` returns, by plain PyTorch."""
    return rotary._Rotate.apply(rotary._plain, q, k, cos, sin)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A fused operation at one size, with the plain PyTorch that it replaces."""

    name: str
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: list[Tensor]  # fp32; the differentiable ones first
    n_leaves: int  # how many of the inputs are differentiable
    n_outputs: int  # how many of the outputs are differentiated


def operations(device: str) -> list[Operation]:
    """Return all operations at all sizes, with random inputs."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def fused_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return norm.rms_norm(x, weight, EPS, residual)

    result = []
    for rows, width in ((2048, 192), (4096, 1024), (4096, 4096)):
        inputs = [draw(rows, width), draw(width)]
        result.append(Operation(f"norm {rows}x{width}", fused_norm, plain_norm, inputs, 2, 1))
        inputs = [draw(rows, width), draw(width), draw(rows, width)]
        result.append(Operation(f"add, norm {rows}x{width}", fused_norm, plain_norm, inputs, 3, 2))
    for shape in ((8, 256, 3, 64), (4, 1024, 24, 128)):
        name = f"norm of heads {'x'.join(map(str, shape))}"
        result.append(Operation(name, fused_norm, plain_norm, [draw(*shape), draw(shape[-1])], 2, 1))
    for batch, length, heads, head_dim in ((8, 256, 6, 64), (4, 1024, 24, 128)):
        q_heads = 2 * heads // 3
        packed = draw(batch, length, heads, head_dim)
        q, k = packed.split((q_heads, heads - q_heads), 2)
        angles = 1000 * torch.rand(length, head_dim // 2, device=device)
        name = f"rotation {batch}x{length}x{heads}x{head_dim}"
        inputs = [q, k, angles.cos(), angles.sin()]
        result.append(Operation(name, rotary.rotate, plain_rotation, inputs, 2, 2))
    return result


def compare(operation: Operation, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return the time ratio of each pass (median, minimum, maximum), and our error divided by plain PyTorch's."""
    n = operation.n_leaves
    constants = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in operation.inputs[n:]]
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in operation.inputs[:n]]
    functions = {"ours": operation.fused, "plain": operation.plain}
    outputs = {name: function(*leaves, *constants)[: operation.n_outputs] for name, function in functions.items()}
    gradients = [torch.randn_like(output) for output in outputs["ours"]]

    def results(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
        """Return the outputs and the gradients of the leaves, in float64."""
        cast = [gradient.to(outputs[0].dtype) for gradient in gradients]
        dleaves = torch.autograd.grad(outputs, leaves, cast, retain_graph=True)
        return [tensor.detach().double() for tensor in (*outputs, *dleaves)]

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_outputs = operation.plain(*exact_leaves, *(tensor.double() for tensor in constants))[: operation.n_outputs]
    exact = results(exact_outputs, exact_leaves)
    errors = {name: _error(results(outputs[name], leaves), exact) for name in functions}

    def forward(name: str) -> None:
        with torch.no_grad():
            functions[name](*leaves, *constants)

    def backward(name: str) -> None:
        torch.autograd.grad(outputs[name], leaves, gradients, retain_graph=True)

    return {
        "operation": operation.name,
        "dtype": str(dtype).removeprefix("torch."),
        "forward": _ratio(forward, leaves[0], rounds),
        "backward": _ratio(backward, leaves[0], rounds),
        "error": errors["ours"] / errors["plain"],
    }


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Return the norm of all relative errors together."""
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(results, exact, strict=True)]).norm())


def _ratio(run: Callable[[str], None], x: Tensor, rounds: int) -> tuple[float, float, float]:
    """Time `run("ours")` and `run("plain")` in turn; return the latter divided by the former: median, minimum, maximum."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    calls = max(_GPU_CALLS if x.is_cuda else 1, _ELEMENTS // x.numel())
    for number in range(rounds + _WARM_UP):
        for name, times in seconds.items():
            took = seconds_of(functools.partial(run, name), calls, x.device)
            if number >= _WARM_UP:
                times.append(took)
    ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


HEAD = "| | dtype | forward | backward | error |\n|---|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """Return the figures of an operation as a line of the table."""
    ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*row[direction]) for direction in ("forward", "backward")]
    return f"| {row['operation']} | {row['dtype']} | {' | '.join(ratios)} | {row['error']:.2f} |"


def main(argv: list[str]) -> None:
    from training.machine import keep_freed_memory  # here, because bench/gpu.py runs without the libraries of training

    options = read_options(argv, {"device": "cpu", "rounds": 15, "only": ""}, {"rounds": 1})
    keep_freed_memory()
    print(HEAD)
    for operation in operations(options["device"]):
        for dtype in (torch.bfloat16, torch.float32):
            if options["only"] in operation.name:
                print(line(compare(operation, dtype, options["rounds"])), flush=True)


if __name__ == "__main__":
    run_command(main, __doc__)
