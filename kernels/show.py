"""What a formula is, before anything is trained with it: `python -m kernels.show FORMULA [name=value ...] [options]`.

    python -m kernels.show 'silu(gate) * up'
    python -m kernels.show 'x * sigmoid(b * x)' b=1.702
    python -m kernels.show 'where(x > 0, x, slope * x)' slope=learned:0.25:channel --plot prelu.png

    name=1.702                  a fixed parameter
    name=learned:0.25           a learned one that starts at 0.25, one for a layer
    name=learned:0.25:channel   the same, one for each of the d_ff channels
    --plot FILE                 draw h and its slope beside ReLU and SiLU; FILE ends in .png, .pdf or .svg
    --c                         all of the generated C; without it the bodies of the two loops are shown
    --triton                    the generated Triton

Prints h and its derivatives, cost and memory, and what the curve does: `activations/properties.py` defines each figure.
A formula that is refused is one sentence with a caret under the place, and exit status 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formula import Formula, FormulaError, parse
from .formula.functions import REGISTRY

if TYPE_CHECKING:
    import sympy

    from .activations.properties import Curve, Properties
    from .formula.program import Program
    from .formula.symbolic import Compiled

_WRITTEN = {  # of what derivatives are made of and the registry does not have
    "where_gt": "where({0} > {1}, {2}, {3})",
    "where_ge": "where({0} >= {1}, {2}, {3})",
    "power": "({0})**{1}",
}
_ENDINGS = (".png", ".pdf", ".svg")


class _Refused(Exception):
    """Bad input, told in one sentence; exit status 2."""


def main(argv: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        FormulaError: the formula or a parameter is refused; nothing has been compiled.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(__doc__)
        return
    formula, options = _read(argv)
    from .formula.domains import check_domains
    from .formula.symbolic import compile_formula

    check_domains(formula)
    compiled = compile_formula(formula)  # all refusals come before torch is loaded, which takes a second or two
    if options["plot"]:
        _check_plot(options["plot"])
    if "triton" in options["code"]:
        _triton_source(compiled)
    from .activations.properties import properties

    found = properties(compiled)
    print("\n".join([*_formula(compiled), "", *_cost(compiled), "", *_shape(found), "", *_code(compiled, options)]))
    if options["plot"]:
        _plot(compiled, options["plot"])
        print(f"\nwritten to {options['plot']}")


def _read(argv: list[str]) -> tuple[Formula, dict[str, Any]]:
    """Take the words of the command line apart."""
    texts, parameters, options = [], {}, {"plot": None, "code": set()}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("--c", "--triton"):
            options["code"].add(word[2:])
        elif name == "--plot":
            options["plot"] = value if equals else next(words, None)
            if not options["plot"]:
                raise _Refused("--plot needs the name of a file, such as --plot curve.png")
        elif word.startswith("--"):
            raise _Refused(f"unknown option {name!r}: choose from --plot, --c, --triton")
        elif equals and name.isidentifier():
            parameters[name] = _parameter(name, value)
        else:
            texts.append(word)
    if len(texts) != 1:
        given = ", ".join(map(repr, texts)) or "none"
        raise _Refused(f"one formula is needed, in quotes, and {given} was given")
    return parse(texts[0], parameters), options


def _parameter(name: str, value: str) -> Any:
    kind, _, rest = value.partition(":")
    number, colon, share = rest.partition(":") if kind == "learned" else (value, "", "")
    try:
        start = float(number)
    except ValueError:
        raise _Refused(
            f"{name}={value} is no parameter: write {name}=1.702, {name}=learned:0.25 or {name}=learned:0.25:channel"
        ) from None
    return start if kind != "learned" else {"init": start, "share": share if colon else "layer"}


# ---------------------------------------------------------------------------------------------------------------- text


def _formula(compiled: Compiled) -> list[str]:
    formula = compiled.formula
    kind = "gated: 3 matrices (gate, up, down)" if formula.gated else "ungated: 2 matrices (up, down)"
    learned = ", ".join(f"{n} (learned, starts at {p.init:g}, one a {p.share})" for n, p in formula.learned.items())
    fixed = ", ".join(f"{name} = {value:g}" for name, value in formula.fixed.items())
    lines = [" ".join(formula.text.split()), f"  {kind}"]
    lines += [f"  parameters: {', '.join(filter(None, (learned, fixed)))}"] if learned or fixed else []
    lines += ["", f"  {'h':<12} = {written(compiled.expression)}"]
    lines += [f"  {f'dh/d{name}':<12} = {written(slope)}" for name, slope in compiled.slopes.items()]
    return lines


def written(expression: sympy.Expr) -> str:
    """Write an expression in the grammar of formulas, long numbers with 6 digits."""
    import sympy
    from sympy.core.parameters import distribute
    from sympy.printing.str import StrPrinter

    class Printer(StrPrinter):
        def _print_Function(self, expr: Any) -> str:
            name, arguments = type(expr).__name__, [self._print(argument) for argument in expr.args]
            if name in _WRITTEN:
                return _WRITTEN[name].format(*arguments)
            if name in REGISTRY and (form := REGISTRY[name].written):
                return form.format(*arguments)
            return super()._print_Function(expr)

    long = [number for number in expression.atoms(sympy.Rational) if number.q > 4]
    with distribute(False):
        short = {n: sympy.sign(n) * sympy.Symbol(f"{abs(float(n)):.6g}", positive=True) for n in long}
        return Printer().doprint(expression.xreplace(short))


def _cost(compiled: Compiled) -> list[str]:
    from .activations.properties import bytes_moved, cost, saved_by_eager

    def line(program: Program) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(cost(program).items())) or "none"

    moved = bytes_moved(compiled.formula)
    ours = 2 * len(compiled.formula.pre_activations)
    without, total = saved_by_eager(compiled.formula)
    return [
        "operations an element",
        f"  forward                  {line(compiled.forward)}",
        f"  backward                 {line(compiled.backward)}",
        "bytes an element of h, in bf16",
        f"  moved                    forward {moved['forward']}, backward {moved['backward']}"
        f" ({moved['backward with h']} where h is written again)",
        f"  saved for backward       {ours} (the packed pre-activations)",
        f"  saved by eager PyTorch   {without} beside h; {total} with h, which the down projection keeps",
    ]


def _shape(found: Properties) -> list[str]:
    lines = [
        "values (|pre-activation| <= 10)",
        f"  at 0                     {found.at_zero:.6g}",
        f"  range                    {found.low:.6g} to {found.high:.6g}",
        f"  under N(0, 1)            mean {found.mean:.4f}, std {found.std:.4f}, RMS {found.rms:.4f}"
        + (f", mean/std {found.mean / found.std:.2f}" if found.std else ""),
    ]
    if found.true_glu is not None:
        lines.append(
            f"  a true GLU               {'yes' if found.true_glu else 'no'} (0 where up is 0, twice where up is)"
        )
    for name, curve in found.curves.items():
        lines += [f"in {name}" + (", the other one being 1" if len(found.curves) > 1 else ""), *_curve(curve)]
    return lines + [f"warning: {warning}" for warning in found.warnings]


def _curve(curve: Curve) -> list[str]:
    dead = ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in curve.dead)
    monotone = curve.monotone
    if monotone == "neither":
        monotone = f"no; the minimum is at {curve.argmin:.4f}"
    return [
        f"  monotone                 {monotone}",
        f"  steepest                 |slope| {curve.steepest:.4g}",
        f"  largest jump of h        {f'{curve.jump:.4g} at {curve.jump_at:.4g}' if curve.jump else 'none'}",
        f"  largest jump of slope    {f'{curve.kink:.4g} at {curve.kink_at:.4g}' if curve.kink else 'none'}",
        f"  dead (h and slope 0)     {dead or 'nowhere'}",
        f"  saturated (|slope|<0.01) {curve.saturated:.1%} of N(0, 1)",
    ]


def _code(compiled: Compiled, options: dict[str, Any]) -> list[str]:
    from .activations import c_source

    if "c" in options["code"]:
        lines = ["C", c_source.source(compiled)]
    else:
        lines = ["C, inside the loop of the forward kernel (fp32; --c shows all)", *_body(compiled.forward)]
        lines += ["and of the backward kernel", *_body(compiled.backward)]
    if "triton" in options["code"]:
        lines += ["", "Triton", _triton_source(compiled)]
    return lines


def _body(program: Program) -> list[str]:
    from .activations.c_source import body

    return [f"    {line}" for line in body(program).splitlines()]


def _triton_source(compiled: Compiled) -> str:
    try:
        from .activations import triton_source
    except ImportError:
        raise _Refused("--triton: the Triton backend is not in this build") from None
    return triton_source.source(compiled)


# ------------------------------------------------------------------------------------------------------------ plotting


def _check_plot(path: str) -> None:
    """Refuse a plot that cannot be drawn or written, before the work is done."""
    if not path.endswith(_ENDINGS):
        raise _Refused(f"--plot {path}: the name must end in {', '.join(_ENDINGS)}")
    if not Path(path).absolute().parent.is_dir():
        raise _Refused(f"--plot {path}: there is no folder {Path(path).parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise _Refused("--plot needs matplotlib, which is not installed: pip install matplotlib") from None


def _plot(compiled: Compiled, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot

    from .activations.properties import Sampler

    sample, silu = Sampler(compiled), torch.nn.functional.silu
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64, requires_grad=True)
    beside = {}
    for name, function in {"ReLU": torch.relu, "SiLU": silu}.items():
        h = function(x)
        beside[name] = (h.detach(), torch.autograd.grad(h.sum(), x)[0])
    x = x.detach()
    gated = compiled.formula.gated
    figure, axes = pyplot.subplots(1, 3 if gated else 2, figsize=(15 if gated else 10, 4), layout="constrained")
    for name, curves in beside.items():
        for axis, curve in zip(axes, curves, strict=False):
            axis.plot(x, curve, "--", linewidth=1, label=name)
    for up in (1.0, -1.0, 0.5) if gated else (None,):
        h, slopes = sample(gate=x, up=torch.full_like(x, up)) if up is not None else sample(x=x)
        label = "h" if up is None else f"h, up = {up:g}"
        for axis, curve in zip(axes, (h, next(iter(slopes.values()))), strict=False):
            axis.plot(x, curve, linewidth=2 if up in (None, 1.0) else 1, label=label)
    over = compiled.formula.pre_activations[0]
    for axis, title in zip(axes, ("h", f"dh/d{over}"), strict=False):
        axis.set(title=title, xlabel=over)
        axis.grid(alpha=0.3)
        axis.legend()
    if gated:
        coarse = x[::10]
        h, _ = sample(gate=coarse[None, :], up=coarse[:, None])
        most = float(h.abs().max()) or 1.0
        image = axes[2].pcolormesh(coarse, coarse, h, cmap="RdBu_r", vmin=-most, vmax=most, rasterized=True)
        axes[2].set(title="h", xlabel="gate", ylabel="up")
        figure.colorbar(image, ax=axes[2])
    figure.suptitle(" ".join(compiled.formula.text.split()), family="monospace", parse_math=False)
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")  # then nobody sees half a file
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, target)
    except OSError as error:
        raise _Refused(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def run() -> None:
    """Run the command: bad input is one sentence on standard error and status 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (FormulaError, _Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


if __name__ == "__main__":
    run()
