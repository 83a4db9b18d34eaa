"""The table of the arms: what each costs per element, the shape of its curve, its source, and who else has it.

Figures are computed in float64 with learned parameters at their initial values. Curves are followed along one pre-activation
for |pre-activation| <= 32, with the other one at 1 and reductions over d_ff at the values of many standard normal channels.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..activations import reference
from ..activations.properties import Sampler, bytes_moved, costs
from ..formula.compiled import Compiled, compile_formula
from ..formula.domains import check_domains
from .arms import PublishedArm

_REACH, _STEP = 32.0, 1 / 16
_HALVINGS = 36  # of a step, to 1e-12
_SMALLEST_JUMP = 1e-6
_WIDTH = 80
_NO_BREAK = "\N{NO-BREAK SPACE}"  # between a library and its operator
_LEGEND = (
    "operations  per element of h, forward and backward; in brackets those that are transcendental",
    "bytes       per element of h that a fused kernel moves, forward and backward, in bf16",
    "curve       smooth: the slope has no jump; kink: the slope has one; jump: h has one; reductions over d_ff are constants",
    "monotone    in x; or in gate, with up = 1, and in up, with gate = 1",
    "zeros       fraction of h that is exactly 0 for standard normal pre-activations",
    "also in     an operator of another library that computes the same function; none: this project only",
)


@dataclasses.dataclass(frozen=True)
class ArmFigures:
    """An arm's figures.

    Attributes:
        operations: forward and backward, each (all, the transcendental ones), per element of h.
        moved: bytes forward and backward that a fused kernel moves, per element of h in bf16.
        curve: "smooth", "kink" or "jump".
        monotone: for each pre-activation "rising", "falling" or "no".
        zeros: the fraction of h that is exactly 0 for standard normal pre-activations.
    """

    arm: PublishedArm
    operations: tuple[tuple[int, int], ...]
    moved: tuple[int, int]
    curve: str
    monotone: tuple[str, ...]
    zeros: float


def row(arm: PublishedArm) -> ArmFigures:
    """Return the figures of an arm.

    Raises:
        FormulaError: its formula is refused.
    """
    check_domains(arm.formula)
    compiled = compile_formula(arm.formula)
    sample = Sampler(compiled)
    points = torch.arange(-_REACH, _REACH + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
    along = {name: sample.along(name) for name in sample.names}
    moved = bytes_moved(arm.formula)
    return ArmFigures(
        arm=arm,
        operations=tuple((sum(counts.values()), counts["transcendental"]) for counts in costs(compiled).values()),
        moved=(moved["forward"], moved["backward"]),
        curve=_curve(along.values(), points),
        monotone=tuple(_monotone(curve(points)[0]) for curve in along.values()),
        zeros=_zeros(compiled, sample.learned),
    )


def _curve(curves: Iterable[Callable[[Tensor], tuple[Tensor, Tensor]]], points: Tensor) -> str:
    jumps = [_jumps(curve, points) for curve in curves]
    if any(of_h for of_h, _ in jumps):
        return "jump"
    return "kink" if any(of_slope for _, of_slope in jumps) else "smooth"


def _jumps(curve: Callable[[Tensor], tuple[Tensor, Tensor]], points: Tensor) -> tuple[bool, bool]:
    """Return whether h and whether its slope has a jump: every step is halved towards its larger change."""
    found = []
    for which in (0, 1):
        left, right = points[:-1], points[1:]
        at_left, at_right = curve(left)[which], curve(right)[which]
        for _ in range(_HALVINGS):
            middle = (left + right) / 2
            at_middle = curve(middle)[which]
            first = (at_middle - at_left).abs() >= (at_right - at_middle).abs()
            left, at_left = torch.where(first, left, middle), torch.where(first, at_left, at_middle)
            right, at_right = torch.where(first, middle, right), torch.where(first, at_middle, at_right)
        found.append(bool((at_right - at_left).abs().max() > _SMALLEST_JUMP))
    return found[0], found[1]


def _monotone(h: Tensor) -> str:
    change, noise = h.diff(), 1e-12 * float(h.abs().max())
    rises, falls = bool((change > noise).any()), bool((change < -noise).any())
    return "no" if rises and falls else "falling" if falls else "rising"


def _zeros(compiled: Compiled, learned: list[Tensor]) -> float:
    """Return the fraction of zeros in a row of d_ff that holds the quantiles of a normal distribution, or all pairs of them."""
    count = 1 << (8 if compiled.formula.gated else 16)
    normal = torch.special.ndtri((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count)
    pre = torch.stack(torch.meshgrid(normal, normal, indexing="ij")).flatten(1) if compiled.formula.gated else normal
    return float((reference.forward(compiled, pre[None], learned) == 0).double().mean())


# -------------------------------------------------------------------------------------------------------------- output


def formula_of(arm: PublishedArm) -> str:
    """Return an arm's formula, and its parameters."""
    formula = arm.formula
    fixed = [f"{name} = {value:g}" for name, value in formula.fixed.items()]
    learned = [f"{name} learned from {parameter.init:g}" for name, parameter in formula.learned.items()]
    return "; ".join([" ".join(formula.text.split()), *([", ".join(fixed + learned)] if fixed or learned else [])])


def as_text(rows: list[ArmFigures]) -> str:
    """Return the table for a terminal of 80 columns: a line of figures for each arm, and below it what is text."""
    head = f"{'arm':<23}{'operations':<16}{'bytes':<7}{'curve':<8}{'monotone':<17}zeros"
    lines = []
    for kind, of_kind in _by_kind(rows):
        lines += [f"{kind}", "", head, "-" * len(head)]
        for each in of_kind:
            lines.append(_figures(each))
            lines += _wrapped(formula_of(each.arm))
            lines += _wrapped(each.arm.source)
            also_in = [name.replace(" ", _NO_BREAK) for name in each.arm.also_in]
            lines += _wrapped(f"also in {', '.join(also_in)}") if also_in else []
        lines.append("")
    legend = [textwrap.fill(line, _WIDTH, subsequent_indent=" " * 12) for line in _LEGEND]
    return "\n".join([*lines, *legend])


def _figures(each: ArmFigures) -> str:
    forward, backward = map(_operations_text, each.operations)
    both = "{:>2} {:>2}".format(*each.moved)
    monotone = ", ".join(each.monotone)
    return f"{each.arm.name:<23}{forward:<8}{backward:<8}{both:<7}{each.curve:<8}{monotone:<17}{each.zeros:>5.0%}"


def as_markdown(rows: list[ArmFigures]) -> str:
    """Return the table in Markdown; docs/catalogue.md holds it."""
    lines = []
    for kind, of_kind in _by_kind(rows):
        lines += [
            f"### {kind.capitalize()}",
            "",
            "| arm | formula | source | operations | bytes | curve | monotone | zeros | also in |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for each in of_kind:
            formula, semicolon, parameters = formula_of(each.arm).partition("; ")
            cells = (
                f"`{each.arm.name}`",
                f"`{formula}`{semicolon}{parameters}",
                each.arm.source,
                ", ".join(map(_operations_text, each.operations)),
                ", ".join(map(str, each.moved)),
                each.curve,
                ", ".join(each.monotone),
                f"{each.zeros:.0%}",
                ", ".join(each.arm.also_in),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for line in _LEGEND:
        name, _, meaning = line.partition("  ")
        lines.append(f"- *{name}*: {meaning.strip()}")
    return "\n".join(lines)


def _by_kind(rows: list[ArmFigures]) -> list[tuple[str, list[ArmFigures]]]:
    kinds = {True: "gated: 3 matrices", False: "ungated: 2 matrices"}
    parts = [(kind, [each for each in rows if each.arm.formula.gated is gated]) for gated, kind in kinds.items()]
    return [(kind, of_kind) for kind, of_kind in parts if of_kind]


def _operations_text(counts: tuple[int, int]) -> str:
    every, transcendental = counts
    return f"{every} ({transcendental})"


def _wrapped(text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in wrapper.wrap(text)]
