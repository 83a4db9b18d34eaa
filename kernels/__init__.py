"""Feed-forward activations compiled from their formula, as fused kernels with a lean backward.

    from formula_ffn import activation
    f = activation("silu(gate) * up")
    h = f(pre)                       # pre (..., 2, d_ff), gate first -> h (..., d_ff)

This folder is imported as `kernels` from the repository, and installed as the package `formula_ffn`.

    formula/          text -> checked tree -> derivatives -> programs; needs no torch
    activations/      the differentiable function, and its backends in C, Triton and plain torch
    norm/ rotary/ cross_entropy/    an op each: the function, its C, its Triton
    c/ triton/        toolchains and primitives of the two kernel languages
    mlp.py            `FormulaMLP`, a feed-forward layer for one rank
    huggingface/      `patch`: the fused layer in a Transformers model
    catalogue/        the published arms: `python -m formula_ffn.catalogue`; which of them a formula is
    show.py           properties of a formula: `python -m formula_ffn.show 'silu(gate) * up'`
    autograd.py       what is refused beyond first derivatives; tensors.py: where a tensor is, and how it lies in memory
    common/           errors, files, options, commands; the other rooms of the repository use them too

The package imports nothing from the other rooms of the repository.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from .formula import Formula, FormulaError, Learned, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .activations.activation import Activation
    from .cross_entropy import cross_entropy_, linear_cross_entropy
    from .huggingface.patching import PatchError, patch, unpatch
    from .mlp import FormulaMLP
    from .norm import rms_norm
    from .rotary import rotate

__all__ = [
    "BACKENDS",
    "Formula",
    "FormulaError",
    "FormulaMLP",
    "Learned",
    "PatchError",
    "activation",
    "cross_entropy_",
    "linear_cross_entropy",
    "parse",
    "patch",
    "rms_norm",
    "rotate",
    "unpatch",
]

BACKENDS = ("auto", "reference", "c", "triton")
_LAZY = {  # name -> module of this package: modules that need torch are imported on first use
    "FormulaMLP": ".mlp",
    "PatchError": ".huggingface.patching",
    "cross_entropy_": ".cross_entropy",
    "linear_cross_entropy": ".cross_entropy",
    "patch": ".huggingface.patching",
    "rms_norm": ".norm",
    "rotate": ".rotary",
    "unpatch": ".huggingface.patching",
}


def activation(
    formula: str | Formula,
    parameters: Mapping[str, Any] | None = None,
    backend: str = "auto",
    from_output: str = "",
) -> Activation:
    """Return the function of pre-activations that `formula` describes.

    >>> import torch
    >>> f = activation("x * sigmoid(b * x)", parameters={"b": {"init": 1.0, "share": "layer"}})
    >>> f(torch.zeros(2, 8), b=torch.ones(1)).shape
    torch.Size([2, 8])

    Args:
        formula: in `x` (ungated), or in `gate` and `up` (gated), and in `parameters` by name. A parsed `Formula` has its own
            parameters and `from_output`.
        parameters: a number for each fixed one, {init: ..., share: layer | channel} for each learned one, or
            {init: ..., share: group, groups: 8} for one value per block of channels;
            {schedule: linear | cosine, from: ..., to: ...} for each scheduled one.
        backend: one of `BACKENDS`; "auto" is the fastest that supports the tensor's device and dtype.
        from_output: the derivative as a formula of the output `h`, if it is one; checked against the derivative.

    Returns:
        A callable: `f(pre, **learned) -> h`, with `pre` (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first),
        a keyword for each learned parameter, of shape (1,), (d_ff,) or (groups,), and for each scheduled one, of shape (1,);
        `h` is (..., d_ff) of the dtype of `pre`. Differentiable once, in `pre` and in the learned parameters.

    Raises:
        FormulaError: the formula is refused; the message points at the place.
        ValueError: an unknown backend, or parameters beside a parsed formula.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if isinstance(formula, Formula):
        if parameters or from_output:
            raise ValueError("a parsed formula has its own parameters and from_output: pass them to `parse`")
        parsed = formula
    else:
        parsed = parse(formula, parameters, from_output)
    from .activations.activation import Activation
    from .formula.domains import check_domains

    check_domains(parsed)
    return Activation(parsed, backend)


# Hugging Face publishes another package called `kernels`, which Transformers imports where it is installed. From the repository
# this folder comes first on the path: names and submodules that it does not have are taken from that package.
if __name__ == "kernels":
    __path__ = pkgutil.extend_path(__path__, __name__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if __name__ == "kernels" and (not name.startswith("__") or name == "__version__"):
        from .common.namesake import attribute_of_namesake

        return attribute_of_namesake(__name__, __path__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
