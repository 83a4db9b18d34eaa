"""C source of a formula's kernels, from one template.

A kernel is two functions. The loop processes one tile of a row in full vectors, over a few streams of elements; the driver
splits rows x width into tiles. The remainder of a row goes through the same loop in padded copies, where pre-activations and
gradients are 0. With learned parameters, rows are split into blocks with their own partial sums, which are added in a fixed
order at the end, so no result depends on the number of threads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ..c.library import DTYPES, PRIMITIVES
from ..formula.compiled import OUTPUT, Compiled
from ..formula.functions import REGISTRY
from ..formula.program import INFIX, Argument, Line, Program
from ..formula.reductions import COLUMN
from .telemetry import ACTIVE, PEAK, STORED, stats_program

BLOCKS = 64  # of rows
_ROUNDS_TO_INFINITY = 2.0**128 - 2.0**103
_OPERATORS = INFIX | {"neg": "-{}"}
# These have a shorter form that is exact enough for bf16.
_SHORT = {"div", *(name for name, function in REGISTRY.items() if function.short_in_c)}


def source(compiled: Compiled) -> str:
    """Return the C source of a formula: forward_T, backward_T, backward_h_T [, from_output_T] for every T of `DTYPES`.

    Each returns 0, or 1 if it cannot allocate memory. Arguments: pointers to pre, [dh, dpre], [h], each learned or scheduled
    parameter (float), [the gradient of each learned one (float)]; then rows and width (int64).
    """
    parts = head_of(compiled)
    for dtype in DTYPES:
        parts += [
            TileKernel(compiled, compiled.forward, dtype, f"forward_{dtype}").text(),
            TileKernel(compiled, compiled.backward, dtype, f"backward_{dtype}").text(),
            TileKernel(compiled, compiled.backward_with_h, dtype, f"backward_h_{dtype}").text(),
        ]
        if compiled.from_output is not None:
            parts.append(
                TileKernel(compiled, compiled.from_output, dtype, f"from_output_{dtype}", pre=(OUTPUT,)).text()
            )
    return "\n".join(parts)


def source_with_stats(compiled: Compiled) -> str:
    """Return the C source of statistics_T for every T of `DTYPES`: the forward kernel with statistics of h and the slopes.

    Each tile goes through the loop of forward_T, with the same h to the last bit, and then, while it is in the cache, through
    the loop of the statistics. Arguments: pointers to pre, h, each parameter as above, each output of `stats_program` (float);
    then rows and width.
    """
    parts = head_of(compiled)
    for dtype in DTYPES:
        forward = TileKernel(compiled, compiled.forward, dtype, f"forward_{dtype}")
        program = stats_program(compiled)
        parts += [forward.loop(), TileKernel(compiled, program, dtype, f"statistics_{dtype}", before=forward).text()]
    return "\n".join(parts)


def head_of(compiled: Compiled) -> list[str]:
    """Return the beginning of a formula's source."""
    return [f"// {' '.join(compiled.formula.text.split())}", PRIMITIVES.read_text(encoding="utf-8")]


def body(program: Program, dtype: str = "f32") -> str:
    """Return the lines of a program for one vector of elements, and its outputs by name."""
    results = (f"{name} = {_argument(value, '')};" for name, value in program.outputs.items())
    return lines_of([*(_line(line, dtype, "") for line in program.lines), *results])


@dataclasses.dataclass(frozen=True)
class _Stream:
    """An array that a loop reads or writes element by element.

    Attributes:
        name: that of the input or output of the program.
        dtype: its type in C.
        address: C expression for the beginning of the current tile.
    """

    name: str
    dtype: str
    address: str


class TileKernel:
    """One kernel of a formula.

    Args:
        pre: names of the pre-activations, if not the formula's.
        before: the kernel that processes every tile first, and whose h this one reads.
        row_totals: of a pass over a row, how each output but h is reduced: "sum", "square", "deviation" (the sum of squares
            about a centre) or "top".
    """

    def __init__(
        self,
        compiled: Compiled,
        program: Program,
        dtype: str,
        name: str,
        pre: tuple[str, ...] | None = None,
        before: TileKernel | None = None,
        row_totals: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.dtype, self.name, self.before = program, dtype, name, before
        self.backward = "dh" in program.used if row_totals else "dh" in program.inputs
        self.reduces = bool(compiled.reductions.all)
        pre, learned = pre or compiled.formula.pre_activations, compiled.formula.learned
        tensors = compiled.formula.tensors
        self.reads = [_Stream(n, dtype, _row("pre", i, len(pre))) for i, n in enumerate(pre)]
        self.writes: list[_Stream] = []
        if self.backward:
            self.reads.append(_Stream("dh", dtype, _row("dh")))
        if self.backward and not row_totals:
            self.writes = [_Stream(f"d{n}", dtype, _row("dpre", i, len(pre))) for i, n in enumerate(pre)]
        if before:
            self.reads.append(_Stream(STORED, dtype, _row("h")))
        if "h" in program.outputs:
            self.writes.append(_Stream("h", dtype, _row("h")))
        self.parameters = list(tensors)
        of_layer = [n for n, p in tensors.items() if p.share == "layer"]
        self.reads += [_Stream(n, "f32", f"p_{n} + first") for n in tensors if n not in of_layer]
        # What is the same in a tile, by name, with its address.
        self.scalars = {n: f"p_{n}[0]" for n in of_layer}
        self.scalars |= {n: at for n, at in row_addresses(compiled).items() if n in program.used}
        # Outputs that are summed over the rows of a block, with their number of elements: 1, or one per column. They follow
        # each other in the block's partial sums, `mine`.
        self.sizes = {f"d{n}": "1" if n in of_layer else "width" for n in learned} if self.backward else {}
        if row_totals is not None:
            self.sizes = dict.fromkeys(row_totals, "1")
        if before:
            self.sizes = {n: "width" if n == ACTIVE else "1" for n in program.outputs}
        sizes = list(self.sizes.values())
        self.offsets = {n: sum_of_sizes(sizes[:i]) for i, n in enumerate(self.sizes)}
        self.sum_of = "bf16" if before else dtype  # precise enough for statistics
        self.totals = {n: "peak" if n == PEAK else "sum" for n, size in self.sizes.items() if size == "1"}
        self.totals |= row_totals or {}
        self.numbered = COLUMN in program.used or "top" in self.totals.values()
        self.sums = [_Stream(n, "f32", f"mine + {self.offsets[n]} + first") for n in self.sizes if n not in self.totals]

    def text(self) -> str:
        """Return the source of both functions."""
        return f"{self.loop()}\n{self.driver()}"

    def value(self, output: str) -> str:
        """Return the C expression of an output."""
        return _argument(self.program.outputs[output])

    def loop(self) -> str:
        """Return the function that processes `n` elements: a multiple of LANES, or fewer than LANES in padded memory."""
        arguments = [f"const {s.dtype} *restrict r_{s.name}" for s in self.reads]
        arguments += [f"{s.dtype} *restrict w_{s.name}" for s in (*self.writes, *self.sums)]
        arguments += [f"const float p_{n}" for n in self.scalars]
        arguments += [f"{'Top' if how == 'top' else 'double'} *restrict s_{n}" for n, how in self.totals.items()]
        arguments += [f"const float m_{n}" for n, how in self.totals.items() if how == "deviation"]
        arguments += ["int64_t column"] if self.numbered else []
        used = self.program.used
        once, each = self.program.split(self.scalars.keys())
        before = [f"const V v_{n} = number(p_{n});" for n in self.scalars if n in used]
        before += [_line(line, self.dtype) for line in once]
        inside = [f"const V v_{s.name} = load_{s.dtype}(r_{s.name} + c);" for s in self.reads if s.name in used]
        inside += [f"const V v_{COLUMN} = numbers_from(column + c);"] if self.numbered else []
        inside += [_line(line, self.dtype) for line in each]
        inside += [f"store_{s.dtype}(w_{s.name} + c, {self.value(s.name)});" for s in self.writes]
        inside += [f"add_f32(w_{s.name} + c, {self.value(s.name)});" for s in self.sums]
        # Padding must not count, whatever the formula's value at 0.
        inside += ["const I counts = lanes_below(n - c);"] if self.totals else []
        inside += [self._accumulate(n, how) for n, how in self.totals.items()]
        ends = {"peak": "*s_{0} = larger(*s_{0}, largest(sum_{0}.high));", "top": "merge_top(s_{0}, sum_{0});"}
        return (
            f"static void {self.name}_tile({', '.join(arguments)}, int64_t n) {{\n"
            + lines_of(before, 1)
            + lines_of((f"{_START.get(how, 'Sum sum_{0} = {{}};').format(n)}" for n, how in self.totals.items()), 1)
            + "    for (int64_t c = 0; c < n; c += LANES) {\n"
            + lines_of(inside, 2)
            + "    }\n"
            + lines_of((ends.get(how, "*s_{0} += whole_of(sum_{0});").format(n) for n, how in self.totals.items()), 1)
            + "}\n"
        )

    def _accumulate(self, n: str, how: str) -> str:
        """Return the statement that adds an output to its total."""
        value = self.value(n)
        if how == "top":
            return f"keep_top(&sum_{n}, k_select(counts, {value}, number(-__builtin_inff())), v_{COLUMN});"
        if how in ("square", "deviation"):
            value = f"square({value}{f' - number(m_{n})' if how == 'deviation' else ''})"
        value = f"k_select(counts, {value}, number(0))"
        if how == "peak":
            return f"sum_{n}.high = k_max(sum_{n}.high, {value});"
        return f"accumulate_{self.sum_of}(&sum_{n}, {value});"

    def tile(self) -> list[str]:
        """Return the lines that process one tile, from column `first` of row `row`: full vectors, then the remainder."""
        outputs = (*self.writes, *self.sums)
        buffers = [*((f"b_r_{s.name}", s) for s in self.reads), *((f"b_w_{s.name}", s) for s in outputs)]
        scalars = [*self.scalars.values(), *(f"&total_{n}" for n in self.totals)]
        scalars += [f"centre_{n}" for n, how in self.totals.items() if how == "deviation"]
        in_place = ", ".join([s.address for _, s in buffers] + scalars + ["first"] * self.numbered)
        padded = ", ".join([buffer for buffer, _ in buffers] + scalars + ["first + whole"] * self.numbered)
        copies_in = [(buffer, s) for buffer, s in buffers if s not in self.writes]
        copies_out = [(buffer, s) for buffer, s in buffers if s in outputs]
        lines = [
            f"{self.name}_tile({in_place}, whole);",
            "if (rest) {",
            *(f"    {s.dtype} {buffer}[LANES] = {{0}};" for buffer, s in buffers),
            *(f"    memcpy({buffer}, {s.address} + whole, rest * sizeof({s.dtype}));" for buffer, s in copies_in),
            f"    {self.name}_tile({padded}, rest);",
            *(f"    memcpy({s.address} + whole, {buffer}, rest * sizeof({s.dtype}));" for buffer, s in copies_out),
            "}",
        ]
        return (self.before.tile() if self.before else []) + lines

    def driver(self) -> str:
        """Return the exported function."""
        arguments = [f"const {self.dtype} *restrict pre"]
        arguments += [f"const {self.dtype} *restrict dh", f"{self.dtype} *restrict dpre"] if self.backward else []
        arguments += [f"{self.dtype} *restrict h"] if self.before or "h" in self.program.outputs else []
        arguments += ["const float *restrict reduced"] if self.reduces else []
        arguments += [f"const float *restrict p_{n}" for n in self.parameters]
        arguments += [f"float *restrict d_{n}" for n in self.sizes]
        head = f"int {self.name}({', '.join(arguments)}, int64_t rows, int64_t width) {{\n"
        head += "    const int64_t across = (width + TILE_WIDTH - 1) / TILE_WIDTH;\n"
        tile = [*TILE, *self.tile()]
        if not self.sizes:
            return (
                head
                + "    PARALLEL_FOR(rows * width)\n"
                + "    for (int64_t work = 0; work < rows * across; work++) {\n"
                + "        const int64_t row = work / across, tile = work % across;\n"
                + lines_of(tile, 2)
                + "    }\n    return 0;\n}\n"
            )
        block = [
            f"const int64_t blocks = rows < {BLOCKS} ? rows : {BLOCKS}, space = {sum_of_sizes(self.sizes.values())};",
            "float *const partial = calloc(blocks * space, sizeof(float));",
            "if (!partial) return 1;",
            "PARALLEL_FOR(rows * width)",
            "for (int64_t block = 0; block < blocks; block++) {",
            "    float *const mine = partial + block * space;",
            *(f"    double total_{n} = 0;" for n in self.totals),
            "    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; row++)",
            "    for (int64_t tile = 0; tile < across; tile++) {",
        ]
        add_up = [
            f"{'keep_largest' if n == PEAK else 'add_up'}(d_{n}, partial + {self.offsets[n]}, {size}, blocks, space);"
            for n, size in self.sizes.items()
        ]
        block_end = [f"    mine[{self.offsets[n]}] = total_{n};" for n in self.totals]
        end = lines_of(["    }", *block_end, "}", *add_up, "free(partial);", "return 0;"], 1)
        return head + lines_of(block, 1) + lines_of(tile, 2) + end + "}\n"


# The columns of tile number `tile` of a row.
TILE = (
    "const int64_t first = tile * TILE_WIDTH, size = width - first < TILE_WIDTH ? width - first : TILE_WIDTH;",
    "const int64_t whole = size / LANES * LANES, rest = size - whole;",
)
_START = {"top": "Lanes sum_{0} = lowest();"}


def row_addresses(compiled: Compiled) -> dict[str, str]:
    """Return the C expressions of the reductions and adjoints of row `row`, by name."""
    reductions = compiled.reductions
    arrays = {"reduced": reductions.names, "adjoints": reductions.adjoints}
    return {name: f"{at}[row * {len(names)} + {i}]" for at, names in arrays.items() for i, name in enumerate(names)}


def _row(array: str, i: int = 0, count: int = 1) -> str:
    """Return the address of column `first` of a row, in matrix i of the `count` matrices that alternate in `array`."""
    return f"{array} + (row * {count} + {i}) * width + first"


def sum_of_sizes(sizes: Iterable[str]) -> str:
    """Return the sum of sizes, which are "1" or "width", as a C expression."""
    counts = Counter(sizes)
    return f"{counts['width']} * width + {counts['1']}"


def _line(line: Line, dtype: str, prefix: str = "v_") -> str:
    printed = [_argument(argument, prefix) for argument in line.arguments]
    if dtype == "bf16" and line.operation in _SHORT:
        text = f"k_{line.operation}_bf16({', '.join(printed)})"
    elif line.operation in _OPERATORS:
        text = _OPERATORS[line.operation].format(*printed)
    else:
        text = f"k_{line.operation}({', '.join(printed)})"
    return f"const {'I' if line.operation in ('gt', 'ge') else 'V'} {line.name} = {text};"


def _argument(argument: Argument, prefix: str = "v_") -> str:
    """Print a number, the name of a line, or that of an input with a prefix: users choose it, and it may be a C keyword."""
    if not isinstance(argument, str):
        return f"number({_literal(float(argument))})"
    return argument if re.fullmatch(r"t[0-9]+", argument) else prefix + argument


def _literal(value: float) -> str:
    """Print a number as a float of C; one that rounds to infinity there is infinity, as it is for the other backends."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    return f"{value.hex()}f" if abs(value) < _ROUNDS_TO_INFINITY else f"{'-' if value < 0 else ''}__builtin_inff()"


def lines_of(lines: Iterable[str], depth: int = 0) -> str:
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)
