"""An FFN activation, compiled from its formula.

    from kernels import activation
    f = activation("silu(gate) * up")
    h = f(pre)                       # pre (..., 2, d_ff), gate first -> h (..., d_ff)

What lives here: the grammar of formulas (`formula.py`, which does not need torch) and the backends that compute them
(`reference.py`: plain torch operations, any floating dtype, any device). What does not: layers, configuration, training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.formula import Formula, FormulaError, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kernels.reference import Activation

__all__ = ["BACKENDS", "Formula", "FormulaError", "activation", "parse"]

BACKENDS = ("auto", "reference")


def activation(formula: str, parameters: Mapping[str, object] | None = None, backend: str = "auto") -> Activation:
    """Return the function of pre-activations that `formula` describes.

    Args:
        formula: of `x` (ungated), or of `gate` and `up` (gated), and of `parameters` by name.
        parameters: the names that the caller will pass as keyword tensors, broadcastable to (..., d_ff).
        backend: one of `BACKENDS`; "auto" is the fastest that this build has.

    Returns:
        A callable: `f(pre, **learned) -> h`, with `pre` (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first),
        and `h` (..., d_ff) of the same dtype. Differentiable in `pre` and in the parameters.

    Raises:
        FormulaError: the formula is refused; the message points at the place.
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose from {', '.join(BACKENDS)}")
    from kernels.reference import Activation

    return Activation(parse(formula, tuple(parameters or ())))
