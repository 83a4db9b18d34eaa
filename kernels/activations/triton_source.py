"""Triton source of a formula's kernels, from one template per kernel.

- A width that is a multiple of 8 is passed as an eighth of it: the compiler then knows that rows are aligned to 16 bytes and
  loads 128 bits at once, whether or not the width is a multiple of 16.
- The gradient of a learned parameter is summed in an order that depends on the shape alone, so results are reproducible.

The elementary functions are in `triton/primitives.py`. This module does not import Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set

import numpy as np
import torch

from ..formula.compiled import OUTPUT, Compiled
from ..formula.functions import REGISTRY
from ..formula.program import INFIX, Argument, Line, Program
from ..formula.reductions import COLUMN
from ..rounding import E4M3, TINY
from .telemetry import STORED, stats_program

_PACKAGE = __name__.rpartition(".activations.")[0]  # "kernels" or "formula_ffn", whichever this was imported as

_OPERATORS = INFIX | {"neg": "{} * -1.0", "select": "tl.where({}, {}, {})"}
_OPERATORS |= {"abs": "tl.abs({})", "max": "fn.maximum({}, {})", "min": "fn.minimum({}, {})"}
# These have a form for fp32 tensors and a shorter one for 16 bits.
_TWO_FORMS = {name for name, function in REGISTRY.items() if function.short_in_triton}


def source(compiled: Compiled) -> str:
    """Return the Python source of a formula's kernels: `forward`, `backward`, `backward_with_h` [, `from_output`].

    Those of a formula with reductions take the numbers per row as arguments: `triton_rows.py` computes them.
    """
    return f"""{imports(compiled)}

{_forward(compiled)}

{_backward(compiled, with_h=False)}

{_backward(compiled, with_h=True)}
{_from_output(compiled)}"""


def source_with_stats(compiled: Compiled) -> str:
    """Return the Python source of `statistics`: the forward kernel with statistics of h and the slopes."""
    return f"{imports(compiled)}\n\n{_statistics(compiled)}"


def imports(compiled: Compiled) -> str:
    """Print the head of a module."""
    return f"""# {" ".join(compiled.formula.text.split())}
import triton
import triton.language as tl

from {_PACKAGE}.triton import primitives as fn
"""


_HEAD = """@triton.jit(do_not_specialize=[{numbers}])
def {name}({pointers}, {numbers_bare}, UNIT: tl.constexpr, TILE: tl.constexpr):
    PRECISE: tl.constexpr = pre.dtype.element_ty == tl.float32
    width = width * UNIT
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
"""


def _head(name: str, pointers: Iterable[str], numbers: Sequence[str]) -> str:
    quoted = ", ".join(f'"{number}"' for number in numbers)
    return _HEAD.format(name=name, pointers=", ".join(pointers), numbers=quoted, numbers_bare=", ".join(numbers))


def numbers_of(compiled: Compiled, backward: bool) -> list[str]:
    """Return the pointers to the numbers per row, which kernels of a formula with reductions take after pre, dh, dpre and h."""
    return [
        *(["reduced"] if compiled.reductions.all else []),
        *(["adjoints"] if compiled.reductions.all and backward else []),
    ]


def pointers_of(compiled: Compiled) -> list[str]:
    """Return the pointers to the parameters."""
    return [f"at_{name}" for name in compiled.formula.tensors]


def load_numbers(compiled: Compiled, *programs: Program) -> list[str]:
    """Print the loads of the numbers of row `row` that programs use."""
    lines, used = [], frozenset().union(*(program.used for program in programs))
    for array, names in (("reduced", compiled.reductions.names), ("adjoints", compiled.reductions.adjoints)):
        lines += [f"v_{n} = tl.load({array} + row * {len(names)} + {i})" for i, n in enumerate(names) if n in used]
    return lines


def load_columns(*programs: Program) -> list[str]:
    """Print the numbers of the columns, if programs use them."""
    return [f"v_{COLUMN} = column.to(tl.float32)"] if any(COLUMN in program.used for program in programs) else []


def load_learned(compiled: Compiled, *programs: Program) -> list[str]:
    """Print the loads of the learned parameters that programs use."""
    lines, used = [], frozenset().union(*(program.used for program in programs))
    for name, parameter in compiled.formula.tensors.items():
        if name in used:
            place = f"at_{name} + column, mask=inside" if parameter.share == "channel" else f"at_{name}"
            lines.append(f"v_{name} = tl.load({place}).to(tl.float32)")
    return lines


def load_pre(compiled: Compiled, *programs: Program) -> list[str]:
    """Print the loads of the pre-activations that programs use, of row `row`."""
    names, used = compiled.formula.pre_activations, frozenset().union(*(program.used for program in programs))
    return [
        f"v_{name} = tl.load({pre_at('pre', len(names), i)}, mask=inside).to(tl.float32)"
        for i, name in enumerate(names)
        if name in used
    ]


def pre_at(tensor: str, count: int, index: int) -> str:
    """Print the address of pre-activation `index` of `count`, of row `row`."""
    return f"{tensor} + row * width + column" if count == 1 else f"{tensor} + (row * 2 + {index}) * width + column"


def _store(place: str, value: Argument, program: Program) -> str:
    return f"tl.store({place}, {argument_of(value, program)}, mask=inside)"


def _forward(compiled: Compiled) -> str:
    pointers = ["pre", "h", *numbers_of(compiled, False), *pointers_of(compiled)]
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        *load_numbers(compiled, compiled.forward),
        *load_learned(compiled, compiled.forward),
        *load_pre(compiled, compiled.forward),
        *lines_of(compiled.forward),
        _store("h + row * width + column", compiled.forward.outputs["h"], compiled.forward),
    ]
    return _head("forward", pointers, ["width"]) + indented(body, 1)


def _statistics(compiled: Compiled) -> str:
    """Print the forward kernel in which a Triton program iterates over a block of rows and reduces `stats_program`."""
    program = stats_program(compiled)
    *sums, peak, active = program.outputs
    pointers = ["pre", "h", *numbers_of(compiled, False), *pointers_of(compiled), "totals", "active"]
    before = [
        *load_learned(compiled, program, compiled.forward),
        *(f"sum_{name} = tl.full((), 0.0, tl.float32)" for name in (*sums, peak)),
        "units = tl.zeros((TILE,), tl.float32)",
        *ROW_LOOP,
    ]
    values = {name: f"tl.where(inside, {argument_of(value, program)}, 0.0)" for name, value in program.outputs.items()}
    row = [
        *load_numbers(compiled, program, compiled.forward),
        *load_pre(compiled, program, compiled.forward),
        *lines_of(compiled.forward),
        f"stored = {_rounded(compiled)}",
        "tl.store(h + row * width + column, stored, mask=inside)",
        f"v_{STORED} = stored.to(tl.float32)",
        *lines_of(program),
        *(f"sum_{name} += tl.sum({values[name]})" for name in sums),
        f"sum_{peak} = tl.maximum(sum_{peak}, tl.max({values[peak]}))",
        f"units += {values[active]}",
        "row += 1",
    ]
    place = "({} * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)"
    after = [f"tl.store(totals + {place.format(i)}, sum_{name})" for i, name in enumerate((*sums, peak))]
    after.append("tl.store(active + tl.program_id(0).to(tl.int64) * width + column, units, mask=inside)")
    head = _head("statistics", pointers, ["rows", "rows_per_program", "width"])
    return head + indented(before, 1) + indented(row, 2) + indented(after, 1)


def _rounded(compiled: Compiled) -> str:
    """Print h as a vector of the output's type; a formula may be a number."""
    return (
        f"tl.where(inside, {argument_of(compiled.forward.outputs['h'], compiled.forward)}, 0.0).to(h.dtype.element_ty)"
    )


# A Triton program that iterates over a block of rows.
ROW_LOOP = (
    "row = tl.program_id(0).to(tl.int64) * rows_per_program",
    "last = tl.minimum(row + rows_per_program, rows)",
    "while row < last:",  # the interpreter has no `range` over runtime values
)


def source_fp8(compiled: Compiled) -> str:
    """Return the Python source of `forward_fp8`: the forward kernel that writes h in FP8, with a scale per row.

    A Triton program computes a row twice: for its largest magnitude, then to write it. The second time its pre-activations come
    from a cache, so memory is read once.
    """
    program = compiled.forward
    value = f"tl.where(inside, {argument_of(program.outputs['h'], program)}, 0.0)"
    column = ["column = start + tl.arange(0, TILE)", "inside = column < width"]
    compute = [*column, *load_numbers(compiled, program), *load_learned(compiled, program)]
    compute += [*load_pre(compiled, program), *lines_of(program)]
    pointers = ["pre", "h", *numbers_of(compiled, False), *pointers_of(compiled), "scales"]
    head = _ROW_HEAD.format(pointers=", ".join(pointers))
    largest = [*compute, f"largest = fn.maximum(largest, tl.abs({value}))", "start += TILE"]
    between = [
        # The sum is NaN where a number is not finite, which `tl.max` would ignore, and so is all of the row's product.
        f"scale = tl.maximum(tl.max(largest), {TINY!r}) / {_LARGEST!r} + tl.sum(largest * 0.0)",
        "tl.store(scales + row, scale)",
        "start = 0",
        "while start < width:",
    ]
    write = [
        *compute,
        f"scaled = fn.minimum(fn.maximum({value} / scale, -{_LARGEST!r}), {_LARGEST!r})",
        "tl.store(h + row * width + column, scaled.to(h.dtype.element_ty), mask=inside)",
        "start += TILE",
    ]
    body = indented(largest, 2) + indented(between, 1) + indented(write, 2)
    return f"{imports(compiled)}\n\n{head}{body}"


_LARGEST = torch.finfo(E4M3).max
_ROW_HEAD = """@triton.jit(do_not_specialize=["width"])
def forward_fp8({pointers}, width, UNIT: tl.constexpr, TILE: tl.constexpr):
    PRECISE: tl.constexpr = True
    width = width * UNIT
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((TILE,), tl.float32)
    start = 0
    while start < width:
"""


def _backward(compiled: Compiled, with_h: bool) -> str:
    """Print a backward kernel. With learned parameters a Triton program iterates over rows, with its sums in registers."""
    program = compiled.backward_with_h if with_h else compiled.backward
    names, learned = compiled.formula.pre_activations, compiled.formula.learned
    pointers = ["pre", "dh", "dpre", *(["h"] if with_h else []), *numbers_of(compiled, True)]
    pointers += pointers_of(compiled)
    row = [*load_numbers(compiled, program), *load_columns(program), *load_pre(compiled, program)]
    if "dh" in program.used:
        row.append("v_dh = tl.load(dh + row * width + column, mask=inside).to(tl.float32)")
    row += lines_of(program)
    row += [_store(pre_at("dpre", len(names), i), program.outputs[f"d{name}"], program) for i, name in enumerate(names)]
    if with_h:
        row.append(_store("h + row * width + column", program.outputs["h"], program))
    # Masked lanes hold arbitrary values, NaN included, so `where` replaces them; a product with 0 would not.
    row += [
        f"sum_{name} += tl.where(inside, {argument_of(program.outputs[f'd{name}'], program)}, 0.0)" for name in learned
    ]
    name = "backward_with_h" if with_h else "backward"
    if learned:
        row.append("row += 1")
    else:
        first = ["row = tl.program_id(0).to(tl.int64)", *load_learned(compiled, program)]
        return _head(name, pointers, ["width"]) + indented([*first, *row], 1)
    pointers += [f"sums_{name}" for name in learned]
    before = [
        *load_learned(compiled, program),
        *(f"sum_{name} = tl.zeros((TILE,), tl.float32)" for name in learned),
        *ROW_LOOP,
    ]
    after = [
        f"tl.store(sums_{name} + tl.program_id(0).to(tl.int64) * width + column, sum_{name}, mask=inside)"
        if parameter.share == "channel"
        else f"tl.store(sums_{name} + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(sum_{name}))"
        for name, parameter in learned.items()
    ]
    head = _head(name, pointers, ["rows", "rows_per_program", "width"])
    return head + indented(before, 1) + indented(row, 2) + indented(after, 1)


def _from_output(compiled: Compiled) -> str:
    """Print the kernel that computes the gradient from h, in the argument `pre`; "" for a formula without `from_output`."""
    program = compiled.from_output
    if program is None:
        return ""
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        f"v_{OUTPUT} = tl.load(pre + row * width + column, mask=inside).to(tl.float32)",
        "v_dh = tl.load(dh + row * width + column, mask=inside).to(tl.float32)",
        *lines_of(program),
        _store("dpre + row * width + column", program.outputs[f"d{OUTPUT}"], program),
    ]
    return "\n" + _head("from_output", ["pre", "dh", "dpre"], ["width"]) + indented(body, 1)


def indented(lines: Iterable[str], levels: int) -> str:
    """Print lines at a level of indentation."""
    return "".join(f"{'    ' * levels}{line}\n" for line in lines)


def lines_of(program: Program) -> list[str]:
    """Print the lines of a program. A quotient by a number of the row is a product with its reciprocal in 16 bits."""
    numbers = {name for name in program.inputs if name[0].isdigit() and name not in (COLUMN, STORED)}
    per_row = numbers | {line.name for line in program.split(numbers)[0]} if numbers else set()
    return [
        f"{line.name} = {_quotient(line, program) if _divides_by(line, per_row) else _operation(line, program)}"
        for line in program.lines
    ]


def _divides_by(line: Line, names: Set[str]) -> bool:
    return line.operation == "div" and line.arguments[1] in names


def _quotient(line: Line, program: Program) -> str:
    above, below = (argument_of(argument, program) for argument in line.arguments)
    return f"fn.quotient({above}, {below}, PRECISE)"


def _operation(line: Line, program: Program) -> str:
    printed = [argument_of(argument, program) for argument in line.arguments]
    if not any(isinstance(argument, str) for argument in line.arguments):  # Triton's functions require a tensor
        printed = [f"tl.full((), {number}, tl.float32)" for number in printed]
    if line.operation in _OPERATORS:
        return _OPERATORS[line.operation].format(*printed)
    return f"fn.{line.operation}({', '.join(printed)}{', PRECISE' if line.operation in _TWO_FORMS else ''})"


def argument_of(argument: Argument, program: Program) -> str:
    """Print a name, or a number rounded to fp32."""
    # Users name parameters: the prefix avoids Python's keywords and the kernel's variables.
    if isinstance(argument, str):
        return f"v_{argument}" if argument in program.inputs else argument
    with np.errstate(over="ignore"):
        number = float(np.float32(argument))
    return f"({number!r})" if math.isfinite(number) else f'float("{number}")'
