"""The registry of elementary functions: one entry defines a function for the grammar, all backends and all checks.

To add a function, write an entry here, a body `k_<name>` in `c/primitives.h`, and a body `<name>` in `triton/primitives.py`.
This module imports neither torch, NumPy nor SymPy: an entry names a function of theirs, or takes the module as its first
argument.

Functions with `in_grammar=False` occur in derivatives only, in a form that is stable in 32-bit arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from . import intervals
from .intervals import Interval

Cost = Literal["compare or select", "divide or root", "transcendental"]
# The name of a function of a module, or a function that takes the module as its first argument.
Implementation = str | Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """An elementary function of one argument, or a choice among several.

    Attributes:
        arity: number of arguments.
        operands: number of operands of the operation, if not `arity`: complement and sech2 take the value of sigmoid or tanh
            as an additional first operand.
        in_grammar: whether formulas may call it.
        operation: whether backends implement it under its name; otherwise `macro` or `program.py` lowers it to others.
        slope: (f, u) -> its derivative at u as a SymPy expression; `f` has every function of this registry, and exact
            numbers (`f.number(0.5)`).
        macro: (f, *arguments) -> the SymPy expression that replaces it.
        interval: (intervals that contain the arguments) -> an interval that contains every value.
        above: exclusive lower bound of the argument; a formula that may violate it is refused.
        above_reason: addition to the message of that refusal.
        numpy, mpmath: the implementation of the checks and of quadrature.
        torch: the implementation of the reference backend, in fp32 or wider.
        eager: the usual form in hand-written torch, in any precision; None: as `torch`.
        cost: the class under which `show` counts it.
        short_in_c: whether there is a shorter form for bf16 tensors, `k_<name>_bf16`.
        short_in_triton: whether the body takes PRECISE, which is false for 16-bit tensors.
        notation: format string with which `show` prints it; None: a call.
    """

    arity: int = 1
    operands: int | None = None
    in_grammar: bool = True
    operation: bool = True
    slope: Callable[[Any, Any], Any] | None = None
    macro: Callable[..., Any] | None = None
    interval: Callable[..., Interval] | None = None
    above: float | None = None
    above_reason: str = ""
    numpy: Implementation | None = None
    mpmath: Implementation | None = None
    torch: Implementation | None = None
    eager: Implementation | None = None
    cost: Cost = "transcendental"
    short_in_c: bool = False
    short_in_triton: bool = False
    notation: str | None = None


def implementation(of: Implementation, module: Any) -> Callable[..., Any]:
    """Return the function of an entry, bound to its module."""
    if isinstance(of, str):
        return getattr(module, of)
    return lambda *arguments: of(module, *arguments)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(intervals.exp(-abs(value)))


def _always(_: intervals.Ends) -> bool:
    return True


def _erf(np: Any, x: Any) -> Any:
    return _each(np, math.erf, x)


def _normal_cdf(np: Any, x: Any) -> Any:
    return _each(np, lambda value: math.erfc(-value * math.sqrt(0.5)) / 2, x)


def _each(np: Any, function: Callable[[float], float], x: Any) -> Any:
    """Return a function of each number, in a third of the time that `np.vectorize` takes."""
    values = np.asarray(x)
    return np.fromiter(map(function, values.ravel().tolist()), np.float32, values.size).reshape(values.shape)


def _tail(torch: Any, x: Any) -> Any:
    """Return sigmoid(-|x|): see `tail` in primitives.h."""
    return torch.sigmoid(-x.abs())


def _sech2(torch: Any, t: Any, u: Any) -> Any:
    tail = _tail(torch, 2 * u)
    return torch.where(t.abs() < 0.5, 1 - t * t, 4 * tail * (1 - tail))


def _mul_sigmoid(torch: Any, a: Any, b: Any) -> Any:
    tail = _tail(torch, b)
    return a * torch.where(b > 0, 1 - tail, tail)


REGISTRY: dict[str, Function] = {
    "abs": Function(
        slope=lambda f, u: f.sign(u),
        interval=intervals.absolute,
        numpy="abs",
        mpmath=lambda _, a: abs(a),
        torch="abs",
        cost="compare or select",
    ),
    "sign": Function(
        slope=lambda f, _: f.number(0),
        interval=intervals.exactly_rising(lambda v: float((v > 0) - (v < 0))),
        numpy="sign",
        mpmath="sign",
        torch="sign",
        cost="compare or select",
    ),
    "sqrt": Function(
        slope=lambda f, u: f.number(0.5) / f.sqrt(u),
        interval=intervals.rising(math.sqrt, (0.0, math.inf), (1.0, 1.0)),
        above=0.0,
        above_reason=": at 0 its derivative is infinite (add a small constant)",
        numpy="sqrt",
        mpmath="sqrt",
        torch="sqrt",
        cost="divide or root",
        short_in_triton=True,
    ),
    "exp": Function(
        slope=lambda f, u: f.exp(u),
        interval=intervals.EXP,
        numpy="exp",
        mpmath="exp",
        torch="exp",
        short_in_c=True,
        short_in_triton=True,
    ),
    "expm1": Function(
        slope=lambda f, u: f.expm1(u) + 1,
        interval=intervals.rising(intervals.expm1, (-1.0, math.inf)),
        numpy="expm1",
        mpmath="expm1",
        torch="expm1",
        short_in_c=True,
        short_in_triton=True,
    ),
    "log": Function(
        slope=lambda f, u: 1 / u,  # noqa: ARG005
        interval=intervals.rising(intervals.log, through=(1.0, 0.0), nonzero=lambda _: False),
        above=0.0,
        numpy="log",
        mpmath=lambda mp, a: mp.log(a) if a else -mp.inf,
        torch="log",
        short_in_triton=True,
    ),
    "log1p": Function(
        slope=lambda f, u: 1 / (1 + u),  # noqa: ARG005
        interval=intervals.rising(intervals.log1p),
        above=-1.0,
        numpy="log1p",
        mpmath="log1p",
        torch="log1p",
    ),
    "sigmoid": Function(
        slope=lambda f, u: f.sigmoid(u) * f.complement(u),
        interval=intervals.rising(lambda v: 1 / (1 + intervals.exp(-v)), (0.0, 1.0), (0.0, 0.5), _always),
        numpy=lambda np, x: 1 / (1 + np.exp(-x)),
        mpmath=lambda mp, a: 1 / (1 + mp.exp(-a)),
        torch="sigmoid",
        short_in_c=True,
        short_in_triton=True,
    ),
    "tanh": Function(
        slope=lambda f, u: f.sech2(u),
        interval=intervals.rising(math.tanh, (-1.0, 1.0)),
        numpy="tanh",
        mpmath="tanh",
        torch="tanh",
        short_in_c=True,
        short_in_triton=True,
    ),
    "sin": Function(
        slope=lambda f, u: f.cos(u),
        interval=lambda _: Interval(-1.0, 1.0),
        numpy="sin",
        mpmath="sin",
        torch="sin",
    ),
    "cos": Function(
        slope=lambda f, u: -f.sin(u),
        interval=lambda _: Interval(-1.0, 1.0),
        numpy="cos",
        mpmath="cos",
        torch="cos",
    ),
    "atan": Function(
        slope=lambda f, u: 1 / (1 + u**2),  # noqa: ARG005
        interval=intervals.rising(math.atan),
        numpy="arctan",
        mpmath="atan",
        torch="atan",
        short_in_triton=True,
    ),
    "erf": Function(
        slope=lambda f, u: f.exact(2 / math.sqrt(math.pi)) * f.exp(-(u**2)),
        interval=intervals.rising(math.erf, (-1.0, 1.0)),
        numpy=_erf,
        mpmath="erf",
        torch="erf",
        short_in_c=True,
        short_in_triton=True,
    ),
    "softplus": Function(
        slope=lambda f, u: f.sigmoid(u),
        interval=intervals.rising(_softplus, (0.0, math.inf), (-math.inf, 0.0), _always),
        numpy=lambda np, x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
        mpmath=lambda mp, a: mp.log1p(mp.exp(a)),
        # Linear above the threshold; at torch's default of 20 the error is 2e-9.
        torch=lambda torch, x: torch.nn.functional.softplus(x, threshold=40.0),
        eager=lambda torch, x: torch.nn.functional.softplus(x),
        short_in_c=True,
        short_in_triton=True,
    ),
    "relu": Function(
        operation=False,
        slope=lambda f, u: f.step(u),
        interval=intervals.exactly_rising(lambda v: max(v, 0.0), intervals.is_positive),
        numpy=lambda np, x: np.maximum(x, 0),
        eager="relu",
    ),
    "silu": Function(
        operation=False,
        macro=lambda f, u: u * f.sigmoid(u),
        interval=intervals.dips,
        numpy=lambda np, x: x / (1 + np.exp(-x)),
        eager=lambda torch, x: torch.nn.functional.silu(x),
    ),
    "gelu": Function(
        operation=False,
        macro=lambda f, u: u * f.normal_cdf(u),
        interval=intervals.dips,
        numpy=lambda np, x: x * (1 + _erf(np, x * math.sqrt(0.5))) / 2,
        eager=lambda torch, x: torch.nn.functional.gelu(x),
    ),
    "gelu_tanh": Function(
        operation=False,
        macro=lambda f, u: u * f.sigmoid(f.number(math.sqrt(8 / math.pi)) * (u + f.number(0.044715) * u**3)),
        interval=intervals.dips,
        numpy=lambda np, x: x / (1 + np.exp(-1.5957691216057308 * (x + 0.044715 * x**3))),
        eager=lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    "max": Function(
        arity=2,
        interval=intervals.maximum,
        numpy="maximum",
        mpmath=lambda _, a, b: max(a, b),
        torch="maximum",
        eager=lambda torch, a, b: _clamped(torch, "max", a, b),
        cost="compare or select",
    ),
    "min": Function(
        arity=2,
        interval=intervals.minimum,
        numpy="minimum",
        mpmath=lambda _, a, b: min(a, b),
        torch="minimum",
        eager=lambda torch, a, b: _clamped(torch, "min", a, b),
        cost="compare or select",
    ),
    "clip": Function(
        arity=3,
        operation=False,
        macro=lambda f, u, low, high: f.min(f.max(u, low), high),
        interval=intervals.clip,
        numpy="clip",
        eager=lambda torch, u, low, high: _clamped(torch, "min", _clamped(torch, "max", u, low), high),
    ),
    # ------------------------------------------------------------------------------------------------- in derivatives only
    "step": Function(  # 1 where u > 0, else 0: the derivative of relu
        in_grammar=False,
        operation=False,
        slope=lambda f, _: f.number(0),
        notation="where({0} > 0, 1, 0)",
    ),
    "normal_cdf": Function(  # (1 + erf(u / sqrt(2))) / 2, without the cancellation that the sum has for u << 0
        in_grammar=False,
        slope=lambda f, u: f.number(1 / math.sqrt(2 * math.pi)) * f.exp(-(u**2) / 2),
        numpy=_normal_cdf,
        mpmath="ncdf",
        torch=lambda torch, x: torch.special.ndtr(x),
        short_in_c=True,
        short_in_triton=True,
    ),
    "complement": Function(  # 1 - sigmoid(u), without the cancellation that the difference has for a large u
        in_grammar=False,
        operands=2,
        slope=lambda f, u: -f.sigmoid(u) * f.complement(u),
        numpy=lambda np, _, u: 1 / (1 + np.exp(u)),
        mpmath=lambda mp, _, u: 1 / (1 + mp.exp(u)),
        torch=lambda torch, _, u: torch.sigmoid(-u),
        short_in_c=True,
        short_in_triton=True,
        notation="(1 - sigmoid({0}))",
    ),
    "sech2": Function(  # 1 - tanh(u)**2, likewise
        in_grammar=False,
        operands=2,
        slope=lambda f, u: -2 * f.tanh(u) * f.sech2(u),
        numpy=lambda np, _, u: 1 / np.cosh(u) ** 2,
        mpmath=lambda mp, _, u: mp.sech(u) ** 2,
        torch=_sech2,
        short_in_c=True,
        short_in_triton=True,
        notation="(1 - tanh({0})**2)",
    ),
    "mul_sigmoid": Function(  # a * sigmoid(b), where nothing else needs the sigmoid
        arity=2,
        in_grammar=False,
        numpy=lambda np, a, b: a / (1 + np.exp(-b)),
        mpmath=lambda mp, a, b: a / (1 + mp.exp(-b)),
        torch=_mul_sigmoid,
        short_in_c=True,
        short_in_triton=True,
    ),
    "tanh_softplus": Function(  # tanh(softplus(u)), of one exponential and one division: n / (n + 2), n = exp(u) (exp(u) + 2)
        in_grammar=False,
        operation=False,
        slope=lambda f, u: f.tanh_softplus_slope(u),
        notation="tanh(softplus({0}))",
    ),
    "tanh_softplus_slope": Function(  # 4 exp(u) (exp(u) + 1) / (n + 2)^2
        in_grammar=False,
        operation=False,
        slope=lambda f, u: f.tanh_softplus_slope(u) * (f.complement(u) - 2 * f.tanh_softplus(u) * f.sigmoid(u)),
        notation="(1 - tanh(softplus({0}))**2)*sigmoid({0})",
    ),
}


def _clamped(torch: Any, kind: str, a: Any, b: Any) -> Any:
    """Return the maximum or minimum of tensors or numbers, in torch: clamp takes numbers, torch.maximum only tensors."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.maximum(a, b) if kind == "max" else torch.minimum(a, b)
    tensor, bound = (a, b) if isinstance(a, torch.Tensor) else (b, a)
    if kind == "max":
        return torch.relu(tensor) if bound == 0 else tensor.clamp(min=bound)
    return tensor.clamp(max=bound)
