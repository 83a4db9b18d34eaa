"""An FFN activation, compiled from its formula.

    from . import activation
    f = activation("silu(gate) * up")
    h = f(pre)                       # pre (..., 2, d_ff), gate first -> h (..., d_ff)

What lives here: the grammar of formulas (`formula.py`, which does not need torch), their derivatives and the programs that
backends print (`symbolic.py`, `program.py`), what is refused because it cannot be computed safely (`safety.py`), and the
backends: plain torch (`reference.py`), C (`c.py`) and Triton (`triton_backend.py`). Beside it two operations written by hand,
for the same machines: `norm.py` and `rotary.py`. What does not live here: layers, configuration, training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .formula import Formula, FormulaError, Learned, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .activations.activation import Activation

__all__ = ["BACKENDS", "Formula", "FormulaError", "Learned", "activation", "parse"]

BACKENDS = ("auto", "reference", "c", "triton")


def activation(
    formula: str | Formula,
    parameters: Mapping[str, Any] | None = None,
    backend: str = "auto",
    from_output: str = "",
) -> Activation:
    """Return the function of pre-activations that `formula` describes.

    Args:
        formula: of `x` (ungated), or of `gate` and `up` (gated), and of `parameters` by name. A `Formula` that `parse`
            returned carries its parameters and `from_output`: nothing else is given then.
        parameters: a number for each one that is fixed, {init: ..., share: layer | channel} for each one that is learned.
        backend: one of `BACKENDS`; "auto" is the fastest that the tensor's device and dtype have.
        from_output: the derivative as a formula of the output `h`, if it is one; checked against the derivative.

    Returns:
        A callable: `f(pre, **learned) -> h`, with `pre` (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first),
        a keyword for each learned parameter, of shape (1,) or (d_ff,), and `h` (..., d_ff) of the dtype of `pre`.
        Differentiable in `pre` and in the learned parameters.

    Raises:
        FormulaError: the formula is refused; the message points at the place.
        ValueError: an unknown backend, or parameters beside a parsed formula.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if isinstance(formula, Formula):
        if parameters or from_output:
            raise ValueError("a parsed formula carries its parameters and from_output: give them to `parse`")
        parsed = formula
    else:
        parsed = parse(formula, parameters, from_output)
    from .activations.activation import Activation
    from .formula.domains import check_domains

    check_domains(parsed)
    return Activation(parsed, backend)
