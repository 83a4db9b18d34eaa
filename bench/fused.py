"""The fused RMSNorm and rotation beside plain PyTorch: `python -m bench.fused [device=cuda] [rounds=15] [only=norm]`.

Both run in one process, in turn, under the allocator settings of `train.py`; a ratio is taken round by round: how many times
longer plain PyTorch took. On a CPU it is the few passes that run where no compiler is (`norm.PLAIN`), on a GPU `F.rms_norm`.
The error is that of all results together against float64, as a share of plain PyTorch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common.commands import run_command
from kernels.common.options import read_options
from kernels.norm import norm
from kernels.rotary import rotary
from training.machine import keep_freed_memory

EPS = 1e-5
_WARM_UP = 3
_CALLS = 2**22  # elements of one measurement: small tensors are computed several times


def plain_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `rms_norm` replaces."""
    s = x if residual is None else x + residual
    if x.is_cuda or x.dtype == torch.float64:
        return F.rms_norm(s, weight.shape, weight, EPS), s
    return norm._RMSNorm.apply(norm.PLAIN, s, None, weight, EPS), s


def plain_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` replaces."""
    return rotary._Rotate.apply(rotary._plain, q, k, cos, sin)


def cases(device: str) -> list[tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor], int]]:
    """Return (name, ours, plain, inputs in fp32, how many of them are differentiable)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return norm.rms_norm(x, weight, EPS, residual)

    found: list[Any] = []
    for rows, width in ((2048, 192), (4096, 1024), (4096, 4096)):
        found.append((f"norm {rows}x{width}", ours, plain_norm, [draw(rows, width), draw(width)], 2))
        inputs = [draw(rows, width), draw(width), draw(rows, width)]
        found.append((f"add, norm {rows}x{width}", ours, plain_norm, inputs, 3))
    heads = (("norm of heads 8x256x3x64", draw(8, 256, 3, 64)), ("norm of heads 4x1024x24x128", draw(4, 1024, 24, 128)))
    found += [(name, ours, plain_norm, [x, draw(x.shape[-1])], 2) for name, x in heads]
    for batch, length, count, width in ((8, 256, 6, 64), (4, 1024, 24, 128)):
        q, k = draw(batch, length, count, width).split(
            (2 * count // 3, count - 2 * count // 3), 2
        )  # as in a packed tensor
        angles = 1000 * torch.rand(length, width // 2, device=device)
        inputs = [q, k, angles.cos(), angles.sin()]
        found.append((f"rotation {batch}x{length}x{count}x{width}", rotary.rotate, plain_rotation, inputs, 2))
    return found


def compare(
    name: str, ours: Any, plain: Any, given: list[Tensor], leaves: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Return a case's figures: of each pass the ratio (median, least, most), and our error as a share of plain PyTorch's."""
    tables = [each.to(torch.promote_types(dtype, torch.float32)) for each in given[leaves:]]
    inputs = [each.to(dtype).detach().requires_grad_() for each in given[:leaves]]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    outputs = {"ours": ours(*inputs, *tables), "plain": plain(*inputs, *tables)}
    used = 2 if name.startswith(("add", "rotation")) else 1
    gradients = [torch.randn_like(each) for each in outputs["ours"][:used]]

    def everything(results: Any, leaves: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(
            results[:used], leaves, [g.to(results[0].dtype) for g in gradients], retain_graph=True
        )
        return [each.detach().double() for each in (*results[:used], *found)]

    true = everything(plain(*exact, *(each.double() for each in tables)), exact)
    errors = {
        key: torch.stack(
            [(a - b).norm() / b.norm() for a, b in zip(everything(each, inputs), true, strict=True)]
        ).norm()
        for key, each in outputs.items()
    }
    figures: dict[str, Any] = {"operation": name, "dtype": str(dtype).removeprefix("torch.")}
    for backward in (False, True):
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(rounds + _WARM_UP):
            for key, function in (("ours", ours), ("plain", plain)):
                start = time.perf_counter()
                for _ in range(max(1, _CALLS // inputs[0].numel())):
                    if backward:
                        torch.autograd.grad(outputs[key][:used], inputs, gradients, retain_graph=True)
                    else:
                        with torch.no_grad():
                            function(*inputs, *tables)
                if inputs[0].is_cuda:
                    torch.cuda.synchronize()
                if number >= _WARM_UP:
                    seconds[key].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
        figures["backward" if backward else "forward"] = statistics.median(ratios), min(ratios), max(ratios)
    return figures | {"error": float(errors["ours"] / errors["plain"])}


HEAD = "| | dtype | forward | backward | error |\n|---|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """Return a case's figures as a line of the table."""
    ratios = ("{:.2f} ({:.2f} to {:.2f})".format(*row[way]) for way in ("forward", "backward"))
    return f"| {row['operation']} | {row['dtype']} | {' | '.join(ratios)} | {row['error']:.2f} |"


def main(argv: list[str]) -> None:
    options = read_options(argv, {"device": "cpu", "rounds": 15, "only": ""}, {"rounds": 1})
    keep_freed_memory()
    print(HEAD)
    for case in cases(options["device"]):
        for dtype in (torch.bfloat16, torch.float32):
            if options["only"] in case[0]:
                print(line(compare(*case, dtype, options["rounds"])), flush=True)


if __name__ == "__main__":
    run_command(main, __doc__)
