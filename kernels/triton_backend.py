"""The Triton backend: a formula's programs printed as Triton kernels.

Notable here:
- one template for forward and one for backward; a formula brings only its program
- fp32 inside, one rounding at the store; bf16, fp16 and fp32 tensors on a GPU, and fp32 on a CPU under TRITON_INTERPRET=1
- a program of the grid has one row and a tile of columns; offsets of rows are int64
- a width that is a multiple of 8 is passed as its eighth, so that the compiler knows that rows begin on 16 bytes and
  loads 128 bits at once, whether or not it is a multiple of 16
- the gradient of a learned parameter is added up in an order that only the shape decides, so results repeat exactly

The functions of the grammar are in `triton_primitives.py`. Importing this module does not import Triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.cache import folder
from kernels.program import INFIX, Argument, Line, Program
from kernels.symbolic import OUTPUT, Compiled
from kernels.telemetry import STORED, Seen, statistics_program, sums_of
from kernels.tensors import on_device_of

TILE = 1024  # columns a program: 128 threads with 8 each, which in 16 bits is one load
WARPS = 4
_SUMS = 256  # blocks of rows at most, whose gradients of learned parameters are added up apart
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(pre: Tensor) -> bool:
    """Whether tensors of this kind can be computed here."""
    if not installed():
        return False
    if interpreted():
        return pre.dtype == torch.float32  # the interpreter's bf16 is wrong
    return pre.is_cuda and torch.version.cuda is not None and pre.dtype in _DTYPES


def refusal(pre: Tensor) -> Exception:
    """Return what to raise where this backend was asked for by name and does not serve `pre`."""
    if not installed():
        return ImportError("the Triton backend needs the package triton, which is not installed: pip install triton")
    kind = f"{pre.dtype} on {pre.device.type}".removeprefix("torch.")
    if interpreted():
        return ValueError(f"under TRITON_INTERPRET=1 the Triton backend computes float32, not {kind}")
    return ValueError(f"the Triton backend computes float32, bfloat16 and float16 on an NVIDIA GPU, not {kind}")


@functools.lru_cache(maxsize=1)
def warn_if_missing() -> None:
    """Say once a process that a GPU is used without Triton."""
    if not installed():
        warnings.warn(
            "no Triton kernels, the slower reference backend computes the activation instead: pip install triton",
            stacklevel=2,
        )


# ----------------------------------------------------------------------------------------------------------------- running


class Kernels:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.module = compiled, load(source(compiled))
        self.pre = len(compiled.formula.pre_activations)
        self.shares = [learned.share for learned in compiled.formula.learned.values()]

    @functools.cached_property
    def module_with_statistics(self) -> ModuleType:
        """The variant of the forward kernel that tells of itself, printed when it is first asked for."""
        return load(source_with_statistics(self.compiled))

    def forward(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """See `reference.forward`."""
        width = pre.shape[-1]
        h = self._empty_h(pre)
        if h.numel():
            self._launch(self.module.forward, h.numel() // width, width, [pre, h, *_detached(learned)])
        return h

    def forward_with_statistics(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, Seen]:
        """See `reference.forward_with_statistics`."""
        width, count = pre.shape[-1], len(sums_of(compiled)) + 1
        h = self._empty_h(pre)
        if not h.numel():
            nothing = torch.zeros(count, device=pre.device)
            return h, Seen(nothing[:-1], nothing[-1], torch.zeros(width, device=pre.device), 0)
        rows = h.numel() // width
        share, blocks = _blocks(rows)
        totals = torch.empty((count, blocks, _tiles(width)), dtype=torch.float32, device=pre.device)
        active = torch.empty((blocks, width), dtype=torch.float32, device=pre.device)
        tensors = [pre, h, *_detached(learned), totals, active]
        self._launch(self.module_with_statistics.statistics, blocks, width, tensors, rows, share)
        return h, Seen(totals[:-1].sum((1, 2)), totals[-1].amax(), active.sum(0), h.numel())

    def backward(
        self, _: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """See `reference.backward`."""
        width, dpre = pre.shape[-1], torch.empty_like(pre)
        h = torch.empty_like(dh) if with_h else None
        if not dh.numel():
            return dpre, h, [torch.zeros(p.shape, dtype=torch.float32, device=pre.device) for p in learned]
        rows, kernel = dh.numel() // width, self.module.backward_with_h if with_h else self.module.backward
        tensors = [pre, dh, dpre, *([h] if h is not None else []), *_detached(learned)]
        if not learned:
            self._launch(kernel, rows, width, tensors)
            return dpre, h, []
        share, blocks = _blocks(rows)
        sums = [
            torch.empty((blocks, width if kind == "channel" else _tiles(width)), dtype=torch.float32, device=pre.device)
            for kind in self.shares
        ]
        self._launch(kernel, blocks, width, [*tensors, *sums], rows, share)
        return dpre, h, [_total(s, p) for s, p in zip(sums, learned, strict=True)]

    def backward_from_output(self, _: Compiled, h: Tensor, dh: Tensor) -> Tensor:
        """See `reference.backward_from_output`."""
        dpre = torch.empty_like(h)
        if h.numel():
            self._launch(self.module.from_output, h.numel() // h.shape[-1], h.shape[-1], [h, dh, dpre])
        return dpre

    def _empty_h(self, pre: Tensor) -> Tensor:
        shape = pre.shape if self.pre == 1 else (*pre.shape[:-2], pre.shape[-1])
        return torch.empty(shape, dtype=pre.dtype, device=pre.device)

    def _launch(self, kernel: Any, programs: int, width: int, tensors: list[Tensor], *rows: int) -> None:
        unit = unit_of(width)
        with on_device_of(tensors[0]):
            kernel[(programs, _tiles(width))](
                *tensors, *rows, width // unit, UNIT=unit, TILE=_tile(width), num_warps=WARPS
            )


def unit_of(width: int) -> int:
    """Return what a width is passed in units of."""
    return 1 if width % 8 else 8


def _tile(width: int) -> int:
    return min(TILE, max(128, 1 << (width - 1).bit_length()))


def _tiles(width: int) -> int:
    return math.ceil(width / _tile(width))


def _blocks(rows: int) -> tuple[int, int]:
    """Return how many rows one program adds up, and how many programs that takes."""
    share = math.ceil(rows / _SUMS)
    return share, math.ceil(rows / share)


def _detached(learned: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in learned]


def _total(sums: Tensor, parameter: Tensor) -> Tensor:
    return (sums.sum(0) if sums.shape[1] == parameter.numel() else sums.sum()).view(parameter.shape)


_kernels: dict[Compiled, Kernels] = {}


def kernels(compiled: Compiled) -> Kernels:
    """Return the kernels of a formula, printed and imported at the first call."""
    if compiled not in _kernels:
        _kernels[compiled] = Kernels(compiled)
    return _kernels[compiled]


# ---------------------------------------------------------------------------------------------------------------- printing

_OPERATORS = INFIX | {"neg": "{} * -1.0", "select": "tl.where({}, {}, {})"}
_OPERATORS |= {"abs": "tl.abs({})", "max": "fn.maximum({}, {})", "min": "fn.minimum({}, {})"}
# One form for fp32 tensors, a shorter one for 16 bits.
_TWO_FORMS = ("exp", "expm1", "log", "softplus", "sqrt", "atan", "erf", "normal_cdf")
_TWO_FORMS += ("sigmoid", "complement", "mul_sigmoid", "tanh", "sech2")


def source(compiled: Compiled) -> str:
    """Return the Python source of a formula's kernels: `forward`, `backward`, `backward_with_h`."""
    return f"""{_imports(compiled)}

{_forward(compiled)}

{_backward(compiled, with_h=False)}

{_backward(compiled, with_h=True)}
{_from_output(compiled)}"""


def source_with_statistics(compiled: Compiled) -> str:
    """Return the Python source of `statistics`: the forward kernel that also tells of h and the slopes."""
    return f"{_imports(compiled)}\n\n{_statistics(compiled)}"


def _imports(compiled: Compiled) -> str:
    return f"""# {" ".join(compiled.formula.text.split())}
import triton
import triton.language as tl

from kernels import triton_primitives as fn
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


def _load_learned(compiled: Compiled, *programs: Program) -> list[str]:
    lines, used = [], frozenset().union(*(program.used for program in programs))
    for name, parameter in compiled.formula.learned.items():
        if name in used:
            place = f"at_{name} + column, mask=inside" if parameter.share == "channel" else f"at_{name}"
            lines.append(f"v_{name} = tl.load({place}).to(tl.float32)")
    return lines


def _load_pre(compiled: Compiled, *programs: Program) -> list[str]:
    names, used = compiled.formula.pre_activations, frozenset().union(*(program.used for program in programs))
    return [
        f"v_{name} = tl.load({_pre_at('pre', len(names), i)}, mask=inside).to(tl.float32)"
        for i, name in enumerate(names)
        if name in used
    ]


def _pre_at(tensor: str, count: int, index: int) -> str:
    return f"{tensor} + row * width + column" if count == 1 else f"{tensor} + (row * 2 + {index}) * width + column"


def _store(place: str, value: Argument, program: Program) -> str:
    return f"tl.store({place}, {_argument(value, program)}, mask=inside)"


def _forward(compiled: Compiled) -> str:
    pointers = ["pre", "h", *(f"at_{name}" for name in compiled.formula.learned)]
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        *_load_learned(compiled, compiled.forward),
        *_load_pre(compiled, compiled.forward),
        *_lines(compiled.forward),
        _store("h + row * width + column", compiled.forward.outputs["h"], compiled.forward),
    ]
    return _head("forward", pointers, ["width"]) + _indented(body, 1)


def _statistics(compiled: Compiled) -> str:
    """Print the forward kernel in which a program walks a block of rows and adds up what `statistics_program` says."""
    program, learned = statistics_program(compiled), compiled.formula.learned
    *sums, peak, active = program.outputs
    pointers = ["pre", "h", *(f"at_{name}" for name in learned), "totals", "active"]
    before = [
        *_load_learned(compiled, program, compiled.forward),
        *(f"sum_{name} = tl.full((), 0.0, tl.float32)" for name in (*sums, peak)),
        "units = tl.zeros((TILE,), tl.float32)",
        *_WALK,
    ]
    counted = lambda name: f"tl.where(inside, {_argument(program.outputs[name], program)}, 0.0)"  # noqa: E731
    row = [
        *_load_pre(compiled, program, compiled.forward),
        *_lines(compiled.forward),
        f"stored = {_rounded(compiled)}",
        "tl.store(h + row * width + column, stored, mask=inside)",
        f"v_{STORED} = stored.to(tl.float32)",
        *_lines(program),
        *(f"sum_{name} += tl.sum({counted(name)})" for name in sums),
        f"sum_{peak} = tl.maximum(sum_{peak}, tl.max({counted(peak)}))",
        f"units += {counted(active)}",
        "row += 1",
    ]
    place = "({} * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)"
    after = [f"tl.store(totals + {place.format(i)}, sum_{name})" for i, name in enumerate((*sums, peak))]
    after.append("tl.store(active + tl.program_id(0).to(tl.int64) * width + column, units, mask=inside)")
    head = _head("statistics", pointers, ["rows", "share", "width"])
    return head + _indented(before, 1) + _indented(row, 2) + _indented(after, 1)


def _rounded(compiled: Compiled) -> str:
    """Print h as a vector of the output's type; a formula may be a number."""
    return f"tl.where(inside, {_argument(compiled.forward.outputs['h'], compiled.forward)}, 0.0).to(h.dtype.element_ty)"


# A program that walks a block of rows.
_WALK = (
    "row = tl.program_id(0).to(tl.int64) * share",
    "last = tl.minimum(row + share, rows)",
    "while row < last:",  # the interpreter has no range of what is not known beforehand
)


def _backward(compiled: Compiled, with_h: bool) -> str:
    """Print a backward kernel. With learned parameters a program walks a block of rows, and keeps its sums in registers."""
    program = compiled.backward_with_h if with_h else compiled.backward
    names, learned = compiled.formula.pre_activations, compiled.formula.learned
    pointers = ["pre", "dh", "dpre", *(["h"] if with_h else []), *(f"at_{name}" for name in learned)]
    row = _load_pre(compiled, program)
    if "dh" in program.used:
        row.append("v_dh = tl.load(dh + row * width + column, mask=inside).to(tl.float32)")
    row += _lines(program)
    row += [
        _store(_pre_at("dpre", len(names), i), program.outputs[f"d{name}"], program) for i, name in enumerate(names)
    ]
    if with_h:
        row.append(_store("h + row * width + column", program.outputs["h"], program))
    # Outside of the tensor stands no 0 but anything, NaN included: chosen away, not multiplied away.
    row += [
        f"sum_{name} += tl.where(inside, {_argument(program.outputs[f'd{name}'], program)}, 0.0)" for name in learned
    ]
    name = "backward_with_h" if with_h else "backward"
    if learned:
        row.append("row += 1")
    else:
        return _head(name, pointers, ["width"]) + _indented(["row = tl.program_id(0).to(tl.int64)", *row], 1)
    pointers += [f"sums_{name}" for name in learned]
    before = [
        *_load_learned(compiled, program),
        *(f"sum_{name} = tl.zeros((TILE,), tl.float32)" for name in learned),
        *_WALK,
    ]
    after = [
        f"tl.store(sums_{name} + tl.program_id(0).to(tl.int64) * width + column, sum_{name}, mask=inside)"
        if parameter.share == "channel"
        else f"tl.store(sums_{name} + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(sum_{name}))"
        for name, parameter in learned.items()
    ]
    head = _head(name, pointers, ["rows", "share", "width"])
    return head + _indented(before, 1) + _indented(row, 2) + _indented(after, 1)


def _from_output(compiled: Compiled) -> str:
    """Print the kernel that computes the gradient from h, which it calls `pre`; nothing where h is not enough."""
    program = compiled.from_output
    if program is None:
        return ""
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        f"v_{OUTPUT} = tl.load(pre + row * width + column, mask=inside).to(tl.float32)",
        "v_dh = tl.load(dh + row * width + column, mask=inside).to(tl.float32)",
        *_lines(program),
        _store("dpre + row * width + column", program.outputs[f"d{OUTPUT}"], program),
    ]
    return "\n" + _head("from_output", ["pre", "dh", "dpre"], ["width"]) + _indented(body, 1)


def _indented(lines: Iterable[str], levels: int) -> str:
    return "".join(f"{'    ' * levels}{line}\n" for line in lines)


def _lines(program: Program) -> list[str]:
    return [f"{line.name} = {_operation(line, program)}" for line in program.lines]


def _operation(line: Line, program: Program) -> str:
    printed = [_argument(argument, program) for argument in line.arguments]
    if not any(isinstance(argument, str) for argument in line.arguments):  # Triton's functions take no bare numbers
        printed = [f"tl.full((), {number}, tl.float32)" for number in printed]
    if line.operation in _OPERATORS:
        return _OPERATORS[line.operation].format(*printed)
    return f"fn.{line.operation}({', '.join(printed)}{', PRECISE' if line.operation in _TWO_FORMS else ''})"


def _argument(argument: Argument, program: Program) -> str:
    """Print a name, or a number as the fp32 that it is computed with."""
    if isinstance(argument, str):  # a parameter may have any name: the prefix keeps it off Python's and the kernel's
        return f"v_{argument}" if argument in program.inputs else argument
    with np.errstate(over="ignore"):
        number = float(np.float32(argument))
    return f"({number!r})" if math.isfinite(number) else f'float("{number}")'


# --------------------------------------------------------------------------------------------------------------- importing


@functools.lru_cache(maxsize=256)
def load(text: str) -> ModuleType:
    """Write kernels to a file, since Triton reads their source back from one, and import it.

    The name is the hash of the text, and the file appears whole or not at all: processes that write the same one do not meet.
    """
    name = f"triton_{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    path = folder() / f"{name}.py"
    if not _holds(path, text):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") == text
    return False
