"""Compile every formula's Triton kernels for Hopper (sm_90), without a GPU, and count: `python -m bench.sm90 [FORMULA ...]`.

Without arguments it takes all formulas and also writes the table to bench/results/sm90.md. Registers, spills and memory
instructions are exact. Instructions per element are the instructions in the machine code, divided by the elements per thread;
with learned parameters, those in the loop over rows. No time is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.formulas import formulas
from kernels import parse
from kernels.activations import triton_backend, triton_rows, triton_source
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.options import read_positional
from kernels.formula.compiled import Compiled, compile_formula
from kernels.triton import runtime

RESULT = Path(__file__).parent / "results" / "sm90.md"
# Instructions per byte that an H200 can issue while its memory moves that byte: 132 multiprocessors of 128 lanes per cycle at
# 1.98 GHz, against 4.3 TB/s.
BUDGET = 132 * 128 * 1.98e9 / 4.3e12
_FUNCTION_UNIT = 8  # issue slots per exp2, log2 or 1/x, whose unit has 16 lanes per cycle, not 128
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel in machine code."""

    name: str  # forward, backward, backward_with_h or statistics; forward_row and so on of a formula with reductions
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    loads: int  # bits of the narrowest load from global memory, except of layer-wide parameters; 128 is the widest; 0: no load
    stores: int  # bits of the narrowest store
    budget: float  # instructions per element
    instructions: float  # per element
    function_unit: float  # exp2, log2, reciprocals and roots among them, per element

    @property
    def fits(self) -> bool:
        """Whether the arithmetic takes no longer than the memory traffic."""
        return max(self.instructions, self.function_unit * _FUNCTION_UNIT) <= self.budget


@functools.cache
def offline(
    compiled: Compiled, dtype: torch.dtype = torch.bfloat16, width_is_multiple_of_8: bool = True
) -> list[Kernel]:
    """Compile a formula's kernels for sm_90 and read the machine code.

    Args:
        dtype: of pre-activations, h and their gradients; learned parameters are fp32.
        width_is_multiple_of_8: whether d_ff is.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET).
    """
    unit = 8 if width_is_multiple_of_8 else 1
    if compiled.reductions.all:  # the longest rows that a program holds
        rows = runtime.load(triton_rows.source_of_rows(compiled))
        longest = {
            "forward_row": triton_backend.LONGEST_FORWARD,
            "backward_row": triton_backend.LONGEST_BACKWARD,
            "backward_row_with_h": triton_backend.LONGEST_BACKWARD,
        }
        functions = [(getattr(rows, name), tile, triton_backend.warps_of_row(tile)) for name, tile in longest.items()]
    else:
        module = runtime.load(triton_source.source(compiled))
        kernels = [getattr(module, name) for name in ("forward", "backward", "backward_with_h")]
        kernels.append(runtime.load(triton_source.source_with_stats(compiled)).statistics)
        functions = [(kernel, triton_backend.TILE, triton_backend.WARPS) for kernel in kernels]
    result = []
    for function, tile, warps in functions:
        kinds = {argument: _kind(argument, dtype) for argument in function.arg_names}
        code = machine_code(function, kinds, {"UNIT": unit, "TILE": tile}, warps)
        result.append(_read(function.__name__, code, compiled, dtype, tile // (32 * warps)))
    return result


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of a kernel, and its resources."""

    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    text: str

    def bits(self, kind: str) -> list[int]:
        """Return the widths in bits of the accesses of a kind (LDG, STG) in the code per tile, the narrowest first."""
        return _bits(_hot(instructions(self.text)), kind)


def machine_code(
    function: Any,
    kinds: dict[str, str],
    constants: dict[str, int | bool],
    warps: int,
    divisible: Iterable[str] = (),
    capability: int = 90,
) -> Code:
    """Compile one kernel for a GPU, sm_90 by default.

    Args:
        function: the kernel.
        kinds: {argument: its type in Triton's notation}.
        constants: values of the arguments of the type "constexpr".
        warps: per program.
        divisible: names of integer arguments divisible by 16, as the launcher would detect; pointers are assumed to be.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if runtime.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it")
    # As the launcher finds for every tensor that torch allocates: it is aligned to 16 bytes.
    aligned = [i for i, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in divisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        text = _cuobjdump("--dump-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(resources["REG"], resources["STACK"] + resources["LOCAL"], text)


_IN_FP32 = ("at_", "sums_", "totals", "active", "reduced", "adjoints", "partial")


def _kind(argument: str, dtype: torch.dtype) -> str:
    if argument.isupper():
        return "constexpr"
    if argument in ("pre", "h", "dh", "dpre"):
        return f"*{_NAMES[dtype]}"
    return "*fp32" if argument.startswith(_IN_FP32) else "i32"


def _read(name: str, code: Code, compiled: Compiled, dtype: torch.dtype, elements: int) -> Kernel:
    """Read the machine code of a kernel with so many elements per thread."""
    body = _hot(instructions(code.text))
    pre = len(compiled.formula.pre_activations)
    # Tensors read and written. The kernel with telemetry runs every `telemetry_every` steps and has no budget.
    kind = name.replace("_row", "")
    moved = {"forward": pre + 1, "backward": 2 * pre + 1, "backward_with_h": 2 * pre + 2}.get(kind, math.inf)
    scalars = sum(learned.share == "layer" for learned in compiled.formula.learned.values()) if kind == "forward" else 0
    numbers = len(compiled.reductions.names) if kind == "forward" else 0  # per row, stored one by one
    return Kernel(
        name,
        registers=code.registers,
        spilled=code.spilled,
        loads=next(iter(code.bits("LDG")[scalars:]), 0),
        stores=code.bits("STG")[numbers],
        budget=moved * dtype.itemsize * BUDGET,
        instructions=len(body) / elements,
        function_unit=sum("MUFU" in line for line in body) / elements,
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[tuple[int, str]]:
    """Return the (address, instruction) pairs of a dump of machine code, without the padding after its end."""
    pairs = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", code)]
    return [(at, line) for at, line in pairs if line != "NOP" and line != f"BRA {at:#x}"]


_JUMP = r"BRA[^,]* (0x[0-9a-f]+)"  # and where to


def _hot(code: list[tuple[int, str]]) -> list[str]:
    """Return the code that runs for every tile: the longest loop that stores, or everything if there is none.

    A loop that stores nothing is in the slow path of sin and cos, which hardly ever runs.
    """
    loops = [(at - int(to, 16), int(to, 16), at) for at, line in code for to in re.findall(_JUMP, line)]
    stores = [at for at, line in code if re.search(r"\bSTG\b", line)]
    whole = (0, 0, code[-1][0])
    _, first, last = max((loop for loop in loops if any(loop[1] <= at < loop[2] for at in stores)), default=whole)
    return [line for at, line in code if first <= at <= last]


def _bits(body: list[str], kind: str) -> list[int]:
    """Return the widths in bits of all accesses of a kind, the narrowest first."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    suffixes = re.findall(rf"\b{kind}((?:\.\w+)+)", "\n".join(body))
    return sorted(next((sizes[part] for part in suffix.split(".") if part in sizes), 32) for suffix in suffixes)


def table(names: list[str], dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the named formulas as a Markdown table."""
    lines = [
        "| formula | kernel | registers | spilled, bytes | narrowest load / store, bits | instructions per element | "
        "function unit, per element | budget | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        compiled = compile_formula(parse(*formulas()[name]))
        for kernel in offline(compiled, dtype):
            over = "" if kernel.fits else "over"
            lines.append(
                f"| {name} | {kernel.name} | {kernel.registers} | {kernel.spilled} | {kernel.loads} / {kernel.stores} "
                f"| {kernel.instructions:.1f} | {kernel.function_unit:.1f} | {kernel.budget:.0f} | {over} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    import triton

    _, chosen = read_positional(argv, {})
    for name in chosen:
        if name not in formulas():
            raise unknown("formula", name, formulas())
    text = table(chosen or list(formulas()))
    if not chosen:
        RESULT.write_text(
            _PAGE.format(
                version=triton.__version__,
                tile=triton_backend.TILE,
                forward=triton_backend.LONGEST_FORWARD,
                backward=triton_backend.LONGEST_BACKWARD,
                table=text,
            ),
            encoding="utf-8",
        )
    print(text, end="")


_PAGE = """# The Triton kernels in machine code for Hopper

Made by `python -m bench.sm90` with Triton {version}, without a GPU: bf16, d_ff % 8 == 0, tiles of {tile} columns.
The budget is the number of instructions that an H200 can issue while the element's bytes move, at 4.3 TB/s. An instruction of
the function unit (exp2, log2, 1/x) takes the issue slots of 8 others. `statistics` is the forward kernel with telemetry, which
runs every `telemetry_every` steps and has no budget. A formula that reduces over d_ff has kernels whose programs hold a whole
row: these are of the longest that they take, {forward:,} channels forward and {backward:,} backward. No time was measured.

{table}"""

if __name__ == "__main__":
    run_command(main, __doc__)
