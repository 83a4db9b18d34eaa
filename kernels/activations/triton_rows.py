"""Triton source of the kernels of a formula with reductions that `triton_source.py` has not: those that work on whole rows.

forward_row, backward_row[_with_h]        a program computes all passes of a row, which it holds in registers
forward_tiles, backward_tiles[_with_h]    the same for longer rows, in tiles that come from a cache after the first pass
reduce_N, gradients_N[_with_h]            pass N of `Reductions.forward` or `Reductions.backward` alone, for rows that tensor
                                          ranks share: it leaves its partial results (`reductions.py`) in memory
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..formula.compiled import Compiled
from ..formula.program import Program
from ..formula.reductions import Pass, Reduction
from .triton_source import (
    ROW_LOOP,
    argument_of,
    imports,
    indented,
    lines_of,
    load_columns,
    load_learned,
    load_numbers,
    load_pre,
    numbers_of,
    pointers_of,
    pre_at,
)

_HEAD = """@triton.jit(do_not_specialize=[{numbers}])
def {name}({pointers}, {numbers_bare}, UNIT: tl.constexpr, TILE: tl.constexpr):
    PRECISE: tl.constexpr = pre.dtype.element_ty == tl.float32
    width = width * UNIT
    channels = tl.full((), 1.0, tl.float32) * width
"""
_LOAD_DH = "v_dh = tl.load(dh + row * width + column, mask=inside).to(tl.float32)"
_TILE = ("column = start + tl.arange(0, TILE)", "inside = column < width")


def source_of_rows(compiled: Compiled) -> str:
    """Return the Python source of the kernels named above."""
    reductions = compiled.reductions
    assert reductions.backward_with_h is not None
    tiles = [] if per_channel(compiled) else [_backward_tiles(compiled, False), _backward_tiles(compiled, True)]
    kernels = [
        _forward_row(compiled),
        _backward_row(compiled, with_h=False),
        _backward_row(compiled, with_h=True),
        _forward_tiles(compiled),
        *tiles,
        *(_reduce(compiled, each, f"reduce_{i}") for i, each in enumerate(reductions.forward)),
        *(_gradients(compiled, each, f"gradients_{i}") for i, each in enumerate(reductions.backward)),
        _gradients(compiled, reductions.backward_with_h, "gradients_0_with_h"),
    ]
    return f"{imports(compiled)}\n\n" + "\n\n".join(kernels)


def per_channel(compiled: Compiled) -> bool:
    """Whether a parameter is learned per channel."""
    return any(parameter.share != "layer" for parameter in compiled.formula.learned.values())


def _head(name: str, pointers: Iterable[str], numbers: Sequence[str] = ("width",)) -> str:
    quoted = ", ".join(f'"{number}"' for number in numbers)
    return _HEAD.format(name=name, pointers=", ".join(pointers), numbers=quoted, numbers_bare=", ".join(numbers))


def _value(program: Program, name: str, outside: str = "0.0") -> str:
    """Print an output as a vector, which is `outside` beyond the row: masked lanes hold arbitrary values."""
    return f"tl.where(inside, {argument_of(program.outputs[name], program)}, {outside})"


# ---------------------------------------------------------------------------------------------------------- rows in registers


def _forward_row(compiled: Compiled) -> str:
    reductions, program = compiled.reductions, compiled.forward
    pointers = ["pre", "h", *numbers_of(compiled, False), *pointers_of(compiled)]
    programs = [program, *(each.program for each in reductions.forward)]
    count = len(reductions.names)
    body = [
        "start = 0",
        *_TILE,
        "row = tl.program_id(0).to(tl.int64)",
        *load_columns(*programs),
        *load_learned(compiled, *programs),
        *load_pre(compiled, *programs),
        *(line for each in reductions.forward for line in _reduced_in_registers(each)),
        *(f"tl.store(reduced + row * {count} + {i}, v_{name})" for i, name in enumerate(reductions.names)),
        *lines_of(program),
        _store_h(program),
    ]
    return _head("forward_row", pointers) + indented(body, 1)


def _backward_row(compiled: Compiled, with_h: bool) -> str:
    """Print a backward kernel. With learned parameters a Triton program iterates over rows, with its sums in registers."""
    program = compiled.backward_with_h if with_h else compiled.backward
    reductions, learned = compiled.reductions, compiled.formula.learned
    programs = [program, *(each.program for each in (*reductions.forward, *reductions.backward))]
    row = [
        *load_pre(compiled, *programs),
        _LOAD_DH,
        *(line for each in reductions.forward for line in _reduced_in_registers(each)),
        *(line for each in reductions.backward for line in _adjoints_in_registers(each)),
        *lines_of(program),
    ]
    row += _store_gradients(compiled, program)
    row += [
        f"sum_{name} += "
        + (_value(program, f"d{name}") if p.share != "layer" else f"tl.sum({_value(program, f'd{name}')})")
        for name, p in learned.items()
    ]
    name = "backward_row_with_h" if with_h else "backward_row"
    pointers = ["pre", "dh", "dpre", *(["h"] if with_h else []), *pointers_of(compiled)]
    before = ["start = 0", *_TILE, *load_columns(*programs), *load_learned(compiled, *programs)]
    if not learned:
        return _head(name, pointers) + indented([*before, "row = tl.program_id(0).to(tl.int64)", *row], 1)
    row.append("row += 1")
    before += [
        f"sum_{name} = tl.zeros((TILE,), tl.float32)"
        if p.share != "layer"
        else f"sum_{name} = tl.full((), 0.0, tl.float32)"
        for name, p in learned.items()
    ]
    after = [
        f"tl.store(sums_{name} + tl.program_id(0).to(tl.int64) * width + column, sum_{name}, mask=inside)"
        if p.share != "layer"
        else f"tl.store(sums_{name} + tl.program_id(0), sum_{name})"
        for name, p in learned.items()
    ]
    head = _head(name, [*pointers, *(f"sums_{name}" for name in learned)], ["rows", "rows_per_program", "width"])
    return head + indented([*before, *ROW_LOOP], 1) + indented(row, 2) + indented(after, 1)


def _reduced_in_registers(each: Pass) -> list[str]:
    """Print a pass of forward over a row in registers, and what all channels share of it."""
    lines = lines_of(each.program)
    for r in each.reductions:
        if r.kind == "max":
            lines += [f"top = {_value(each.program, r.value, _LOWEST)}", *_top(r, "top", "column", "inside")]
            continue
        lines.append(f"e = {_value(each.program, r.value)}")
        if r.kind == "std":
            lines += [
                f"v_{r.second} = tl.sum(e) / channels",
                f"e = tl.where(inside, e - v_{r.second}, 0.0)",
            ]
        total = "tl.sum(e)" if r.kind in ("mean", "sum") else "tl.sum(e * e)"
        lines.append(f"v_{r.value} = {_shared_value(r, total)}")
    return lines


def _shared_value(r: Reduction, total: str) -> str:
    if r.kind == "sum":
        return total
    mean = f"{total} / channels"
    return mean if r.kind == "mean" else f"fn.sqrt({mean} + {r.epsilon!r}, True)"


_LOWEST, _NO_COLUMN = 'float("-inf")', "2147483647"


def _top(r: Reduction, values: str, columns: str, where: str) -> list[str]:
    """Print the largest of a vector, NaN if there is one, and the first of `columns` that has it, among the lanes `where`."""
    return [
        f"nan = {where} & ({values} != {values})",
        "any_nan = tl.max(nan.to(tl.int32)) > 0",
        f"largest = tl.max(tl.where(nan, {_LOWEST}, {values}))",
        f"hit = tl.where(any_nan, nan, {where} & ({values} == largest))",
        f'v_{r.value} = tl.where(any_nan, float("nan"), largest)',
        f"v_{r.second} = tl.min(tl.where(hit, {columns}, {_NO_COLUMN})).to(tl.float32)",
    ]


def _adjoints_in_registers(each: Pass) -> list[str]:
    """Print a pass of backward over a row in registers."""
    lines = lines_of(each.program)
    for r in each.reductions:
        lines.append(f"total = tl.sum({_value(each.program, r.adjoint)})")
        lines.append(f"v_{r.adjoint} = {_shared_adjoint(r, 'total')}")
    return lines


def _shared_adjoint(r: Reduction, total: str) -> str:
    if r.kind in ("sum", "max"):
        return total
    mean = f"{total} / channels"
    return mean if r.kind == "mean" else f"tl.where(v_{r.value} == 0.0, 0.0, {mean} / v_{r.value})"


# -------------------------------------------------------------------------------------------------------------- rows in tiles


def _forward_tiles(compiled: Compiled) -> str:
    reductions, program = compiled.reductions, compiled.forward
    pointers = ["pre", "h", *numbers_of(compiled, False), *pointers_of(compiled)]
    count = len(reductions.names)
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        *(line for each in reductions.forward for line in _reduced_in_tiles(compiled, each)),
        *(f"tl.store(reduced + row * {count} + {i}, v_{name})" for i, name in enumerate(reductions.names)),
        *_over_tiles([*_inputs(compiled, program), *lines_of(program), _store_h(program)]),
    ]
    return _head("forward_tiles", pointers) + indented(body, 1)


def _backward_tiles(compiled: Compiled, with_h: bool) -> str:
    """Print a backward kernel, for parameters learned per layer alone: a program has no place for the sums of every channel."""
    program = compiled.backward_with_h if with_h else compiled.backward
    reductions, learned = compiled.reductions, compiled.formula.learned
    write = [*_inputs(compiled, program), *lines_of(program), *_store_gradients(compiled, program)]
    write += [f"sum_{name} += {_value(program, f'd{name}')}" for name in learned]
    row = [
        *(line for each in reductions.forward for line in _reduced_in_tiles(compiled, each)),
        *(line for each in reductions.backward for line in _adjoints_in_tiles(compiled, each)),
        *_over_tiles(write),
    ]
    name = "backward_tiles_with_h" if with_h else "backward_tiles"
    pointers = ["pre", "dh", "dpre", *(["h"] if with_h else []), *pointers_of(compiled)]
    if not learned:
        return _head(name, pointers) + indented(["row = tl.program_id(0).to(tl.int64)", *row], 1)
    before = [*(f"sum_{name} = tl.zeros((TILE,), tl.float32)" for name in learned), *ROW_LOOP]
    after = (f"tl.store(sums_{name} + tl.program_id(0), tl.sum(sum_{name}))" for name in learned)
    head = _head(name, [*pointers, *(f"sums_{name}" for name in learned)], ["rows", "rows_per_program", "width"])
    return head + indented(before, 1) + indented([*row, "row += 1"], 2) + indented(after, 1)


def _reduced_in_tiles(compiled: Compiled, each: Pass) -> list[str]:
    """Print a pass of forward over the tiles of a row, and what all channels share of it."""
    lines = _totals_in_tiles(compiled, each)
    for r in each.reductions:
        if r.kind != "max":
            lines.append(f"v_{r.value} = {_shared_value(r, f'total_{r.value}')}")
    return lines


def _totals_in_tiles(compiled: Compiled, each: Pass) -> list[str]:
    """Print the loops of a pass of forward: they leave sums in total_R, about the mean for std, and the value of max in v_R."""
    program, about = each.program, [r for r in each.reductions if r.kind == "std"]
    compute = [*_inputs(compiled, program), *lines_of(program)]
    start, inside, after = [], [], []
    for r in each.reductions:
        if r.kind == "max":
            start += [
                f"top_{r.value} = tl.full((TILE,), {_LOWEST}, tl.float32)",
                f"at_top_{r.value} = tl.full((TILE,), {_NO_COLUMN}, tl.int32)",
            ]
            inside += [
                f"top = {_value(program, r.value, _LOWEST)}",
                f"better = inside & ((top > top_{r.value}) | (top != top) | (at_top_{r.value} == {_NO_COLUMN}))",
                f"better = better & (top_{r.value} == top_{r.value})",
                f"at_top_{r.value} = tl.where(better, column, at_top_{r.value})",
                f"top_{r.value} = tl.where(better, top, top_{r.value})",
            ]
            after += _top(r, f"top_{r.value}", f"at_top_{r.value}", f"(at_top_{r.value} != {_NO_COLUMN})")
            continue
        start.append(f"sum_{r.value} = tl.zeros((TILE,), tl.float32)")
        inside.append(f"e = {_value(program, r.value)}")
        inside.append(f"sum_{r.value} += e * e" if r.kind == "rms" else f"sum_{r.value} += e")
        after.append(f"total_{r.value} = tl.sum(sum_{r.value})")
    lines = [*start, *_over_tiles([*compute, *inside]), *after]
    if about:
        squares = []
        for r in about:
            lines += [f"v_{r.second} = total_{r.value} / channels", f"sum_{r.value} = tl.zeros((TILE,), tl.float32)"]
            squares += [
                f"e = tl.where(inside, {_value(program, r.value)} - v_{r.second}, 0.0)",
                f"sum_{r.value} += e * e",
            ]
        lines += _over_tiles([*compute, *squares])
        lines += [f"total_{r.value} = tl.sum(sum_{r.value})" for r in about]
    return lines


def _sums_in_tiles(compiled: Compiled, each: Pass) -> list[str]:
    """Print the loop of a pass of backward: total_B is the sum S. Writes h if the program has it."""
    program = each.program
    compute = [*_inputs(compiled, program), *lines_of(program)]
    compute += [f"sum_{r.adjoint} += {_value(program, r.adjoint)}" for r in each.reductions]
    compute += [_store_h(program)] if "h" in program.outputs else []
    start = [f"sum_{r.adjoint} = tl.zeros((TILE,), tl.float32)" for r in each.reductions]
    after = [f"total_{r.adjoint} = tl.sum(sum_{r.adjoint})" for r in each.reductions]
    return [*start, *_over_tiles(compute), *after]


def _adjoints_in_tiles(compiled: Compiled, each: Pass) -> list[str]:
    """Print a pass of backward over the tiles of a row."""
    shares = [f"v_{r.adjoint} = {_shared_adjoint(r, f'total_{r.adjoint}')}" for r in each.reductions]
    return [*_sums_in_tiles(compiled, each), *shares]


def _reduce(compiled: Compiled, each: Pass, name: str) -> str:
    """Print a pass of forward whose partial results go to `partial`."""
    stored: list[str] = []
    for r in each.reductions:
        if r.kind == "max":
            stored += [f"v_{r.value}", f"v_{r.second}"]
        else:
            stored += [*([f"v_{r.second}"] if r.second else []), f"total_{r.value}"]
    pointers = ["pre", "reduced", *pointers_of(compiled), "partial"]
    return _head(name, pointers) + indented(_one_pass(compiled, each, _totals_in_tiles(compiled, each), stored), 1)


def _gradients(compiled: Compiled, each: Pass, name: str) -> str:
    """Print a pass of backward whose sums go to `partial`."""
    h = ["h"] if "h" in each.program.outputs else []
    pointers = ["pre", "dh", *h, "reduced", "adjoints", *pointers_of(compiled), "partial"]
    sums = [f"total_{r.adjoint}" for r in each.reductions]
    return _head(name, pointers) + indented(_one_pass(compiled, each, _sums_in_tiles(compiled, each), sums), 1)


def _one_pass(compiled: Compiled, each: Pass, lines: list[str], stored: list[str]) -> list[str]:
    """Print a pass by itself: it loads the numbers of the row that it needs, and stores its own."""
    stores = (f"tl.store(partial + row * {len(stored)} + {i}, {value})" for i, value in enumerate(stored))
    return ["row = tl.program_id(0).to(tl.int64)", *load_numbers(compiled, each.program), *lines, *stores]


def _inputs(compiled: Compiled, program: Program) -> list[str]:
    """Print what a tile loads for a program."""
    lines = [*_TILE, *load_columns(program), *load_learned(compiled, program), *load_pre(compiled, program)]
    return lines + ([_LOAD_DH] if "dh" in program.used else [])


def _store_gradients(compiled: Compiled, program: Program) -> list[str]:
    """Print the stores of the gradients of pre-activations, and of h if the program has it."""
    names = compiled.formula.pre_activations
    values = {name: argument_of(program.outputs[f"d{name}"], program) for name in names}
    stores = [f"tl.store({pre_at('dpre', len(names), i)}, {values[n]}, mask=inside)" for i, n in enumerate(names)]
    return stores + ([_store_h(program)] if "h" in program.outputs else [])


def _store_h(program: Program) -> str:
    return f"tl.store(h + row * width + column, {argument_of(program.outputs['h'], program)}, mask=inside)"


def _over_tiles(lines: Iterable[str]) -> list[str]:
    return ["start = 0", "while start < width:", *(f"    {line}" for line in lines), "    start += TILE"]
