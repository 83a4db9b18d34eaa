"""The FP8 products of a feed-forward layer's up projection on one GPU, beside bf16; `bench/gpu.py` runs it.

Each way computes the three products of the layer, roundings included: the result, the gradient of the input and that of the
weight. Its results are compared with operands that torch rounds, multiplied in fp32; the activation that is written in FP8 by
its own kernel, with the one that torch rounds.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu_step import Model, attempted, timed
from conf.schema import FFNConfig, PrecisionConfig
from kernels import activation
from kernels.common.errors import UserError
from kernels.rounding import rounding
from kernels.triton.runtime import interpreted
from model.products import PLAIN, Products, products_of


def fp8_products(model: Model, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of each way, its speed, and the largest relative error of its three results."""
    tokens = model.sequences * model.length
    x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (model.d_model, 2 * model.d_ff))
    weight = torch.randn(2 * model.d_ff, model.d_model, device=device, dtype=dtype)
    flops = 3 * 2 * tokens * weight.numel()

    def three(products: Products) -> list[Tensor]:
        gradients = products.input_gradient(dy, weight), products.weight_gradient(dy, x)
        return [products.forward(x, weight), *gradients]

    def one(row: dict[str, Any], name: str, scaling: str) -> dict[str, Any]:
        products, same = PLAIN, None
        if scaling:
            products, _ = products_of(PrecisionConfig(name, scaling=scaling), device)
            same, _ = products_of(PrecisionConfig("bf16", emulate="fp8", scaling=scaling), device)
            with unittest.mock.patch.object(rounding, "_kernels", return_value=None):
                expected = three(same)
            pairs = zip(three(products), expected, strict=True)
            row["error"] = max(_error(a, b) for a, b in pairs)
        seconds = timed(lambda: three(products), device, rounds)
        return row | {"seconds": seconds, "flops_per_second": flops / seconds[0]}

    def fused(row: dict[str, Any]) -> dict[str, Any]:
        pre = dy.view(tokens, 2, model.d_ff)
        swiglu, same = (activation(FFNConfig().formula, backend=backend) for backend in ("auto", "reference"))
        (values, scale), (expected_values, expected_scale) = (each.forward_fp8(pre, []) for each in (swiglu, same))
        row["error"] = _error(values.float() * scale, expected_values.float() * expected_scale)
        return row | {"seconds": timed(lambda: swiglu.forward_fp8(pre, []), device, rounds)}

    # Expected: a GPU without FP8 units, or no kernel for these sizes.
    for name, scaling in (("bf16", ""), ("fp8", "rowwise"), ("fp8", "tensorwise")):
        row: dict[str, Any] = {"model": model.name, "method": f"{name} {scaling}".strip()}
        yield from attempted(row, one, row, name, scaling, expected=(RuntimeError, UserError))
    row = {"model": model.name, "method": "swiglu in fp8"}
    yield from attempted(row, fused, row, expected=RuntimeError)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative norm of the error; 0 in the interpreter, whose roundings to FP8 err."""
    return 0.0 if interpreted() else float((actual - expected).float().norm() / expected.float().norm())
