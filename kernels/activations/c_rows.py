"""C source of the kernels of a formula with reductions, which process a row in several passes while it is in the cache.

The passes of a kernel are numbered: those of `Reductions.forward`, in a kernel of the gradients those of `Reductions.backward`,
and the map that writes h or the gradients. A call runs the passes `from` to `to`. All of them at once combine what a pass
reduced before the next begins; one alone leaves its partial results (`reductions.py`), for the other tensor ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..c.library import DTYPES
from ..formula.compiled import Compiled
from ..formula.program import Program
from ..formula.reductions import Pass, Reduction
from .c_source import BLOCKS, TILE, TileKernel, head_of, lines_of, row_addresses, sum_of_sizes

_HOW = {"mean": "sum", "sum": "sum", "rms": "square", "std": "sum", "max": "top"}


def source_of_rows(compiled: Compiled) -> str:
    """Return the C source of forward_T, backward_T, backward_h_T and gradients_h_T for every T of `DTYPES`.

    Each returns 0, or 1 if it cannot allocate memory. Arguments: pointers to pre, [dh, dpre], [h], the reductions and [the
    adjoints] (float, in and out), each learned parameter (float), [its gradient (float)]; then rows, width, the first pass and
    the one after the last (int64). gradients_h_T runs the first pass of the gradients, and writes h.
    """
    return "\n".join([*head_of(compiled), *(_kernels(compiled, dtype) for dtype in DTYPES)])


def _kernels(compiled: Compiled, dtype: str) -> str:
    reductions = compiled.reductions
    first = reductions.backward_with_h
    assert first is not None
    kernels = {
        "forward": (reductions.forward, (), compiled.forward),
        "backward": (reductions.forward, reductions.backward, compiled.backward),
        "backward_h": (reductions.forward, reductions.backward, compiled.backward_with_h),
        "gradients_h": ((), (first,), None),
    }
    return "\n".join(
        _RowKernel(compiled, f"{name}_{dtype}", dtype, forward, backward, last).text()
        for name, (forward, backward, last) in kernels.items()
    )


class _Sweep:
    """A pass over a row that reduces: one loop, or two if there is an std, whose squares are taken about the mean."""

    def __init__(self, compiled: Compiled, each: Pass, dtype: str, name: str, backward: bool) -> None:
        self.reductions, self.backward, self.names = each.reductions, backward, row_addresses(compiled)
        self.outputs = {r: r.adjoint if backward else r.value for r in each.reductions}
        how = {name: "sum" if backward else _HOW[r.kind] for r, name in self.outputs.items()}
        self.first = TileKernel(compiled, each.program, dtype, name, row_totals=how)
        self.about = [r for r in each.reductions if r.kind == "std" and not backward]
        squares = {r.value: "deviation" for r in self.about}
        self.second = (
            TileKernel(compiled, each.program, dtype, f"{name}_about", row_totals=squares) if squares else None
        )

    def loops(self) -> list[str]:
        """Return the functions that process a tile."""
        return [self.first.loop(), *([self.second.loop()] if self.second else [])]

    def lines(self) -> list[str]:
        """Return the statements for row `row`."""
        starts = {"top": "Top total_{0} = {{-__builtin_inff(), 0}};"}
        lines = [starts.get(how, "double total_{0} = 0;").format(name) for name, how in self.first.totals.items()]
        lines += _over_tiles(self.first)
        if self.second:
            lines += [f"const double mean_{r.value} = total_{r.value} / width;" for r in self.about]
            lines += [f"const float centre_{r.value} = mean_{r.value};" for r in self.about]
            lines += [f"total_{r.value} = 0;" for r in self.about]
            lines += _over_tiles(self.second)
        return lines + [line for r in self.reductions for line in self._store(r)]

    def _store(self, r: Reduction) -> list[str]:
        total = f"total_{self.outputs[r]}"
        if self.backward:
            at, value = self.names[r.adjoint], self.names[r.value]
            shared = {"mean": f"{total} / width", "sum": total, "max": total}
            root = f"{value} == 0 ? 0 : {total} / width / {value}"
            return [f"{at} = whole_row ? {shared.get(r.kind, root)} : {total};"]
        at = self.names[r.value]
        if r.kind == "max":
            assert r.second is not None
            return [f"{at} = {total}.value;", f"{self.names[r.second]} = {total}.column;"]
        if r.kind == "sum":
            return [f"{at} = {total};"]
        if r.kind == "mean":
            return [f"{at} = whole_row ? {total} / width : {total};"]
        root = f"__builtin_sqrt({total} / width + {r.epsilon!r})"
        if r.kind == "rms":
            return [f"{at} = whole_row ? {root} : {total};"]
        assert r.second is not None
        mean = f"mean_{r.value}"
        return [f"{at} = whole_row ? {root} : {mean};", f"{self.names[r.second]} = whole_row ? {mean} : {total};"]


class _RowKernel:
    """One exported function."""

    def __init__(
        self, compiled: Compiled, name: str, dtype: str, forward: Sequence[Pass], backward: Sequence[Pass],
        last: Program | None,
    ) -> None:  # fmt: skip
        self.name, self.dtype, self.parameters = name, dtype, list(compiled.formula.tensors)
        self.sweeps = [
            *(_Sweep(compiled, each, dtype, f"{name}_{i}", backward=False) for i, each in enumerate(forward)),
            *(_Sweep(compiled, each, dtype, f"{name}_d{i}", backward=True) for i, each in enumerate(backward)),
        ]
        self.last = TileKernel(compiled, last, dtype, name) if last else None
        self.gradients = bool(backward)
        self.sizes = self.last.sizes if self.last else {}
        self.writes_h = self.last is None or "h" in self.last.program.outputs

    def text(self) -> str:
        """Return the loops and the driver."""
        loops = [loop for sweep in self.sweeps for loop in sweep.loops()]
        return "\n".join([*loops, *([self.last.loop()] if self.last else []), self._driver()])

    def _driver(self) -> str:
        const = f"const {self.dtype} *restrict"
        arguments = [f"{const} pre"]
        arguments += [f"{const} dh"] if self.gradients else []
        arguments += [f"{self.dtype} *restrict dpre"] if self.gradients and self.last else []
        arguments += [f"{self.dtype} *restrict h"] if self.writes_h else []
        arguments += ["float *restrict reduced"] + (["float *restrict adjoints"] if self.gradients else [])
        arguments += [f"const float *restrict p_{n}" for n in self.parameters]
        arguments += [f"float *restrict d_{n}" for n in self.sizes]
        arguments += ["int64_t rows", "int64_t width", "int64_t from", "int64_t to"]
        count = len(self.sweeps) + bool(self.last)
        row: list[str] = []
        for number, sweep in enumerate(self.sweeps):
            row += [f"if (from <= {number} && {number} < to) {{", *_indented(sweep.lines()), "}"]
        totals = self.last.totals if self.last else {}
        if self.last:
            row += [f"if (to == {count}) {{", *_indented(_over_tiles(self.last)), "}"]
        body = [
            "const int64_t across = (width + TILE_WIDTH - 1) / TILE_WIDTH;",
            f"const int whole_row = {f'to - from == {count}' if self.last else 0};",
            *self._blocks(row, list(totals), count),
            "return 0;",
        ]
        return f"int {self.name}({', '.join(arguments)}) {{\n{lines_of(body, 1)}}}\n"

    def _blocks(self, row: list[str], totals: list[str], count: int) -> list[str]:
        """Return the loop over rows: in blocks with partial sums of the gradients of learned parameters, if there are any."""
        loop = "for (int64_t row = 0; row < rows; row++) {"
        if not self.sizes:
            return ["PARALLEL_FOR(rows * width)", loop, *_indented(row), "}"]
        assert self.last is not None
        offsets = self.last.offsets
        inside = [
            f"float *const mine = partial + block * ({sum_of_sizes(self.sizes.values())});",
            *(f"double total_{n} = 0;" for n in totals),
            "for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; row++) {",
            *_indented(row),
            "}",
            *(f"mine[{offsets[n]}] = total_{n};" for n in totals),
        ]
        return [
            f"const int64_t blocks = rows < {BLOCKS} ? rows : {BLOCKS}, space = {sum_of_sizes(self.sizes.values())};",
            "float *const partial = calloc(blocks * space, sizeof(float));",
            "if (!partial) return 1;",
            "PARALLEL_FOR(rows * width)",
            "for (int64_t block = 0; block < blocks; block++) {",
            *_indented(inside),
            "}",
            f"if (to == {count}) {{",
            *(f"    add_up(d_{n}, partial + {offsets[n]}, {size}, blocks, space);" for n, size in self.sizes.items()),
            "}",
            "free(partial);",
        ]


def _over_tiles(kernel: TileKernel) -> list[str]:
    return ["for (int64_t tile = 0; tile < across; tile++) {", *_indented([*TILE, *kernel.tile()]), "}"]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
