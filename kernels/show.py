"""Print the properties of a formula before training: `python -m kernels.show FORMULA [NAME=VALUE ...] [options]`.

    python -m kernels.show swiglu
    python -m kernels.show 'silu(gate) * up'
    python -m kernels.show 'x * sigmoid(b * x)' b=1.702
    python -m kernels.show 'max(x, s*x)' s=learned:0.25:channel --plot prelu.png

    ARM                         an arm of conf/ffn by its name, in place of a formula
    NAME=1.702                  a fixed parameter
    NAME=learned:0.25           a learned parameter that starts at 0.25, one per layer
    NAME=learned:0.25:channel   the same, one for each of the d_ff channels
    --plot FILE                 plot h and its slope, with ReLU and SiLU; FILE ends in .png, .pdf or .svg
    --c                         print all of the generated C, not only the bodies of the two loops
    --triton                    print the generated Triton

Prints h and its derivatives, which published arm it is and which differ from it only by constants (`catalogue/likeness.py`),
cost and memory, and the shape of the curve (`activations/properties.py` defines the figures). A formula that cannot be computed
safely is refused in one sentence, with a caret under the place and exit status 2.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import arms
from .common.commands import run_command
from .common.errors import UserError, unknown
from .common.options import split_options, whole_number
from .formula import Formula, FormulaError, parse
from .formula.functions import REGISTRY
from .formula.grammar import PRE_ACTIVATIONS

if TYPE_CHECKING:
    import sympy

    from .activations.properties import Curve, Properties
    from .catalogue.arms import PublishedArm
    from .formula.compiled import Compiled
    from .formula.program import Program
    from .formula.reductions import Reductions

_NOTATION = {  # of functions in derivatives that the registry does not have
    "where_gt": "where({0} > {1}, {2}, {3})",
    "where_ge": "where({0} >= {1}, {2}, {3})",
    "power": "({0})**{1}",
}
_OPTIONS = {"plot": "", "c": False, "triton": False}
_PLOT_FORMATS = (".png", ".pdf", ".svg")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: an argument is invalid.
        FormulaError: the formula or a parameter is refused; nothing has been compiled.
    """
    formula, options = _read(argv)
    from .formula.compiled import compile_formula
    from .formula.domains import check_domains

    check_domains(formula)
    compiled = compile_formula(formula)  # all refusals come before torch is imported, which takes a second or two
    if options["plot"]:
        _check_plot(options["plot"])
    from .activations.properties import properties

    sections = [
        _formula(formula, compiled),
        _published(formula),
        _cost(compiled),
        _shape(properties(compiled)),
        _code(compiled, options),
    ]
    print("\n\n".join("\n".join(section) for section in sections if section))
    if options["plot"]:
        _plot(compiled, options["plot"])
        print(f"\nwritten to {options['plot']}")


def _read(argv: list[str]) -> tuple[Formula, dict[str, Any]]:
    """Return the parsed formula with its parameters, and the options.

    Only arguments that begin with -- are options: a formula may have parameters named c, plot or triton.
    """
    options, others = _options(argv)
    texts, parameters = [], {}
    for argument in others:
        name, equals, value = argument.partition("=")
        if equals and name.isidentifier():
            parameters[name] = _parameter(name, value)
        else:
            texts.append(argument)
    if len(texts) != 1:
        given = ", ".join(map(repr, texts)) or "none"
        raise UserError(f"expected one formula, in quotes, not {given}")
    arm = _arm(texts[0])
    return parse(
        arm.get("formula", texts[0]), {**arm.get("parameters", {}), **parameters}, arm.get("from_output", "")
    ), options


def _arm(text: str) -> dict[str, Any]:
    """Return the keys of an arm of conf/ffn by its name; {} of a formula, or where the arms are missing."""
    if not arms.names() or text in PRE_ACTIVATIONS or not text.isidentifier():
        return {}
    return arms.arm(text).keys


def _options(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options, and the arguments that are none."""
    given, others = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--plot":  # its value may be the next argument
            argument = f"--plot={next(arguments, '')}"
        if argument == "--plot=":
            raise UserError("--plot needs the name of a file, such as --plot curve.png")
        (given if argument.startswith("--") else others).append(argument)
    options, invalid = split_options(given, _OPTIONS, flags={"c": True, "triton": True})
    if invalid:
        raise unknown("option", invalid[0].partition("=")[0], [f"--{name}" for name in _OPTIONS])
    return options, others


def _parameter(name: str, value: str) -> float | dict[str, Any]:
    kind, _, rest = value.partition(":")
    number, *shared_by = rest.split(":") if kind == "learned" else (value,)
    try:
        start = float(number)
    except ValueError:
        raise UserError(
            f"invalid parameter {name}={value}: write {name}=1.702, {name}=learned:0.25 or {name}=learned:0.25:channel"
        ) from None
    if kind != "learned":
        return start
    parameter: dict[str, Any] = {"init": start, "share": shared_by[0] if shared_by else "layer"}
    if groups := ":".join(shared_by[1:]):
        parameter["groups"] = groups if whole_number(groups) is None else whole_number(groups)
    return parameter


# ---------------------------------------------------------------------------------------------------------------- text


def _formula(formula: Formula, compiled: Compiled) -> list[str]:
    kind = "gated: 3 matrices (gate, up, down)" if formula.gated else "ungated: 2 matrices (up, down)"
    learned = ", ".join(
        f"{n} (learned, starts at {p.init:g}, one per {p.share}{f', {p.groups} groups' if p.groups else ''})"
        for n, p in formula.learned.items()
    )
    scheduled = ", ".join(
        f"{n} (scheduled, {p.first:g} to {p.last:g}, {p.schedule})" for n, p in formula.scheduled.items()
    )
    fixed = ", ".join(f"{name} = {value:g}" for name, value in formula.fixed.items())
    lines = [" ".join(formula.text.split()), f"  {kind}"]
    lines += (
        [f"  parameters: {', '.join(filter(None, (learned, scheduled, fixed)))}"] if formula.tensors or fixed else []
    )
    lines += ["", f"  {'h':<12} = {notation(compiled.expression)}"]
    lines += [f"  {f'dh/d{name}':<12} = {notation(slope)}" for name, slope in compiled.slopes.items()]
    for r in compiled.reductions.all:
        epsilon = f", {r.epsilon:g}" if r.epsilon else ""
        value = f"{r.kind}({notation(r.argument)}{epsilon})"
        lines.append(f"  {r.labels[r.value]:<12} = {value}, per token; constant in the slopes above")
    labels = _labels(compiled.reductions)
    return [_labelled(line, labels) for line in lines]


def _labels(reductions: Reductions) -> dict[str, str]:
    from .formula.reductions import COLUMN

    return {name: label for r in reductions.all for name, label in r.labels.items()} | {COLUMN: "channel"}


def _labelled(text: str, labels: Mapping[str, str]) -> str:
    """Return a text in which reductions have the names that a person reads."""
    return re.sub(r"\b0[a-z][0-9]*\b", lambda match: labels.get(match[0], match[0]), text)


def notation(expression: sympy.Expr) -> str:
    """Return an expression in the grammar of formulas, with long numbers rounded to 6 digits."""
    import sympy
    from sympy.printing.str import StrPrinter

    from .formula.symbolic import plain_algebra

    class Printer(StrPrinter):
        def _print_Function(self, expr: Any) -> str:
            name, arguments = type(expr).__name__, [self._print(argument) for argument in expr.args]
            if name in _NOTATION:
                return _NOTATION[name].format(*arguments)
            if name in REGISTRY and (form := REGISTRY[name].notation):
                return form.format(*arguments)
            return super()._print_Function(expr)

    long = [number for number in expression.atoms(sympy.Rational) if number.q > 4]
    with plain_algebra():
        short = {n: sympy.sign(n) * sympy.Symbol(f"{abs(float(n)):.6g}", positive=True) for n in long}
        return Printer().doprint(expression.xreplace(short))


def _published(formula: Formula) -> list[str]:
    """Return which published arms the formula is, and which are like it; nothing where the arms cannot be read."""
    if not arms.can_be_read():
        return []
    from .catalogue.likeness import likeness

    try:
        found = likeness(formula, arms.arms())
    except UserError as error:  # of another formula
        return ["published arms", f"  not compared: {str(error).splitlines()[0]}"]
    lists = {
        "the same": [f"{arm.name}: {arm.source}" for arm in found.same],
        "the same at the start": [_names(found.at_start)],
        "gate and up exchanged": [_names(found.exchanged)],
        "only constants differ": [_names(found.by_constants)],
    }
    lines = [
        line for label, entries in lists.items() for entry in filter(None, entries) for line in _entry(label, entry)
    ]
    return ["published arms", *(lines or ["  none is the same, or differs only by constants"])]


def _names(found: list[PublishedArm]) -> str:
    return ", ".join(arm.name for arm in found)


def _entry(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=f"  {label:<25}", subsequent_indent=" " * 27, break_on_hyphens=False)


def _cost(compiled: Compiled) -> list[str]:
    from .activations.properties import bytes_moved, costs, saved_by_eager

    def line(counts: Counter[str]) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"

    operations = costs(compiled)
    moved = bytes_moved(compiled.formula)
    saved = 2 * len(compiled.formula.pre_activations)
    without_h, with_h = saved_by_eager(compiled.formula)
    return [
        "operations per element",
        f"  forward                  {line(operations['forward'])}",
        f"  backward                 {line(operations['backward'])}",
        "bytes per element of h, in bf16",
        f"  moved                    forward {moved['forward']}, backward {moved['backward']}"
        f" ({moved['backward with h']} where h is recomputed)",
        f"  saved for backward       {saved} (the packed pre-activations)",
        f"  saved by eager PyTorch   {without_h} without h; {with_h} with h, which the down projection saves",
    ]


def _shape(result: Properties) -> list[str]:
    lines = [
        "values (|pre-activation| <= 10)",
        f"  at 0                     {result.at_zero:.6g}",
        f"  range                    {result.low:.6g} to {result.high:.6g}",
        f"  under N(0, 1)            mean {result.mean:.4f}, std {result.std:.4f}, RMS {result.rms:.4f}"
        + (f", mean/std {result.mean / result.std:.2f}" if result.std else ""),
    ]
    if result.true_glu is not None:
        lines.append(f"  a true GLU               {'yes' if result.true_glu else 'no'} (h is proportional to up)")
    for name, curve in result.curves.items():
        lines += [f"in {name}" + (", with the other one at 1" if len(result.curves) > 1 else ""), *_curve(curve)]
    return lines + [f"warning: {warning}" for warning in result.warnings]


def _curve(curve: Curve) -> list[str]:
    dead = ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in curve.dead)
    monotone = curve.monotone
    if monotone == "neither":
        monotone = f"no; the minimum is at {round(curve.argmin, 4) + 0.0:.4f}"  # not at -0.0000
    return [
        f"  monotone                 {monotone}",
        f"  steepest                 |slope| {curve.steepest:.4g}",
        f"  largest jump of h        {f'{curve.jump:.4g} at {curve.jump_at:.4g}' if curve.jump else 'none'}",
        f"  largest jump of slope    {f'{curve.kink:.4g} at {curve.kink_at:.4g}' if curve.kink else 'none'}",
        f"  dead (h and slope 0)     {dead or 'nowhere'}",
        f"  saturated (|slope|<0.01) {curve.saturated:.1%} of N(0, 1)",
    ]


def _code(compiled: Compiled, options: dict[str, Any]) -> list[str]:
    from .activations import c_backend, triton_rows, triton_source

    reductions = compiled.reductions
    if options["c"]:
        lines = ["C", c_backend.source_of(compiled)]
    else:
        lines = ["C, inside the loop of the forward kernel (fp32; --c prints everything)"]
        lines += _bodies([each.program for each in reductions.forward], compiled.forward, reductions)
        lines += ["inside the loop of the backward kernel"]
        lines += _bodies([each.program for each in reductions.backward], compiled.backward, reductions)
    if options["triton"]:
        lines += ["", "Triton", triton_source.source(compiled)]
        lines += [triton_rows.source_of_rows(compiled)] if reductions.all else []
    return lines


def _bodies(passes: Sequence[Program], last: Program, reductions: Reductions) -> list[str]:
    """Print the loops over a row: those of its passes that reduce, then that which writes."""
    from .activations.c_source import body

    labels = _labels(reductions)
    parts = [
        f"    {_labelled(line, labels)}" for program in (*passes, last) for line in [*body(program).splitlines(), ""]
    ]
    return parts[:-1]


# ------------------------------------------------------------------------------------------------------------ plotting


def _check_plot(path: str) -> None:
    """Refuse a plot that cannot be drawn or written, before anything is computed."""
    if not path.endswith(_PLOT_FORMATS):
        raise UserError(f"--plot {path}: the name must end in {', '.join(_PLOT_FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--plot {path}: the folder {Path(path).parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None


def _plot(compiled: Compiled, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot

    from .activations.properties import Sampler

    sample, silu = Sampler(compiled), torch.nn.functional.silu
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64, device="cpu", requires_grad=True)
    baselines = {}
    for name, function in {"ReLU": torch.relu, "SiLU": silu}.items():
        h = function(x)
        baselines[name] = (h.detach(), torch.autograd.grad(h.sum(), x)[0])
    x = x.detach()
    gated = compiled.formula.gated
    figure, axes = pyplot.subplots(1, 3 if gated else 2, figsize=(15 if gated else 10, 4), layout="constrained")
    for name, curves in baselines.items():
        for axis, curve in zip(axes, curves, strict=False):
            axis.plot(x, curve, "--", linewidth=1, label=name)
    for up in (1.0, -1.0, 0.5) if gated else (None,):
        h, slopes = sample(gate=x, up=torch.full_like(x, up)) if up is not None else sample(x=x)
        label = "h" if up is None else f"h, up = {up:g}"
        for axis, curve in zip(axes, (h, next(iter(slopes.values()))), strict=False):
            axis.plot(x, curve, linewidth=2 if up in (None, 1.0) else 1, label=label)
    argument = compiled.formula.pre_activations[0]
    for axis, title in zip(axes, ("h", f"dh/d{argument}"), strict=False):
        axis.set(title=title, xlabel=argument)
        axis.grid(alpha=0.3)
        axis.legend()
    if gated:
        coarse = x[::10]
        h, _ = sample(gate=coarse[None, :], up=coarse[:, None])
        limit = float(h.abs().max()) or 1.0
        image = axes[2].pcolormesh(coarse, coarse, h, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True)
        axes[2].set(title="h", xlabel="gate", ylabel="up")
        figure.colorbar(image, ax=axes[2])
    figure.suptitle(" ".join(compiled.formula.text.split()), family="monospace", parse_math=False)
    target = Path(path)
    # So that readers never see a partial file.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def run() -> None:
    """Run the command line program; a refused formula is bad input, as an invalid argument is."""
    usage = (__doc__ or "").replace("kernels.show", f"{__package__}.show")
    run_command(_main, usage, needs_arguments=True)


def _main(argv: list[str]) -> None:
    try:
        main(argv)
    except FormulaError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run()
