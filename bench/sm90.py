"""What Triton's compiler makes of every formula for Hopper (sm_90), found without a GPU: `python -m bench.sm90 [formula ...]`.

Registers, spills and memory instructions are exact. Instructions an element are what stands in the machine code, divided by the
elements of a thread; with learned parameters, what stands in the loop over rows. No time is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from kernels.activations import triton_backend, triton_source
from kernels.formula.symbolic import Compiled, compile_formula
from kernels.triton import runtime

RESULT = Path(__file__).parent / "results" / "sm90.md"
# Instructions that fit into the time in which a byte moves: 132 multiprocessors of an H200 issue 128 lanes a cycle at 1.98 GHz,
# and its memory moves 4.3 TB/s.
BUDGET = 132 * 128 * 1.98e9 / 4.3e12
_FUNCTION_UNIT = 8  # instructions that go by while exp2, log2 or 1/x is computed: 16 lanes a cycle, not 128
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel in machine code."""

    name: str  # forward, backward, backward_with_h or statistics
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    loads: int  # bits of the narrowest load from global memory, but for parameters of the layer; 128 is the widest; 0: none
    stores: int
    budget: float  # instructions an element
    instructions: float  # an element
    function_unit: float  # of them exp2, log2, reciprocals, roots: an element

    @property
    def fits(self) -> bool:
        """Whether the arithmetic takes no longer than the memory."""
        return max(self.instructions, self.function_unit * _FUNCTION_UNIT) <= self.budget


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
    module, found = runtime.load(triton_source.source(compiled)), []
    constants = {"UNIT": 8 if width_is_multiple_of_8 else 1, "TILE": triton_backend.TILE}
    functions = [getattr(module, name) for name in ("forward", "backward", "backward_with_h")]
    functions.append(runtime.load(triton_source.source_with_stats(compiled)).statistics)
    for function in functions:
        name, kinds = function.__name__, {argument: _kind(argument, dtype) for argument in function.arg_names}
        found.append(_read(name, machine_code(function, kinds, constants, triton_backend.WARPS), compiled, dtype))
    return found


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    text: str

    def bits(self, kind: str) -> list[int]:
        """Return the widths of the accesses of a kind (LDG, STG) in what runs for every tile, the narrowest first."""
        return _bits(_hot(instructions(self.text)), kind)


def machine_code(
    function: Any, kinds: dict[str, str], constants: dict[str, int | bool], warps: int, divisible: Iterable[str] = ()
) -> Code:
    """Compile one kernel for sm_90.

    Args:
        function: the kernel.
        kinds: of each argument the type, as Triton writes it.
        constants: values of the arguments of the type "constexpr".
        warps: of a program.
        divisible: names of the numbers that 16 divides, which the launcher sees; pointers are taken to be.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if runtime.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it")
    # What the launcher says of every tensor that torch has allocated: it begins on 16 bytes.
    known = [i for i, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in divisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in known}
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        text = _cuobjdump("--dump-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(resources["REG"], resources["STACK"] + resources["LOCAL"], text)


def _kind(argument: str, dtype: torch.dtype) -> str:
    if argument.isupper():
        return "constexpr"
    if argument in ("pre", "h", "dh", "dpre"):
        return f"*{_NAMES[dtype]}"
    return "*fp32" if argument.startswith(("at_", "sums_", "totals", "active")) else "i32"


def _read(name: str, code: Code, compiled: Compiled, dtype: torch.dtype) -> Kernel:
    body = _hot(instructions(code.text))
    pre = len(compiled.formula.pre_activations)
    # Tensors. One that runs every `telemetry_every` steps may take its time.
    moved = {"forward": pre + 1, "backward": 2 * pre + 1, "backward_with_h": 2 * pre + 2}.get(name, math.inf)
    scalars = sum(learned.share == "layer" for learned in compiled.formula.learned.values()) if name == "forward" else 0
    elements = triton_backend.TILE // (32 * triton_backend.WARPS)
    return Kernel(
        name,
        registers=code.registers,
        spilled=code.spilled,
        loads=next(iter(code.bits("LDG")[scalars:]), 0),
        stores=code.bits("STG")[0],
        budget=moved * dtype.itemsize * BUDGET,
        instructions=len(body) / elements,
        function_unit=sum("MUFU" in line for line in body) / elements,
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[tuple[int, str]]:
    """Return the (address, instruction) of a dump of machine code, without the padding behind its end."""
    found = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", code)]
    return [(at, line) for at, line in found if line != "NOP" and line != f"BRA {at:#x}"]


def _hot(code: list[tuple[int, str]]) -> list[str]:
    """Return what runs for every tile: the longest loop, or all where there is none."""
    loops = [
        (at - int(to, 16), int(to, 16), at) for at, line in code for to in re.findall(r"BRA[^,]* (0x[0-9a-f]+)", line)
    ]
    _, first, last = max((loop for loop in loops if loop[0] > 0), default=(0, 0, code[-1][0]))
    return [line for at, line in code if first <= at <= last]


def _bits(body: list[str], kind: str) -> list[int]:
    """Return the widths of all accesses of a kind, the narrowest first."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    found = re.findall(rf"\b{kind}((?:\.\w+)+)", "\n".join(body))
    return sorted(next((sizes[part] for part in each.split(".") if part in sizes), 32) for each in found)


def table(names: list[str], dtype: torch.dtype = torch.bfloat16) -> str:
    """Return a Markdown table of the formulas of these names."""
    lines = [
        "| formula | kernel | registers | spilled, bytes | narrowest load / store, bits | instructions an element | "
        "function unit, an element | budget | |",
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


def main() -> None:
    import triton

    parser = argparse.ArgumentParser("python -m bench.sm90", description=__doc__)
    parser.add_argument(
        "formula", nargs="*", help=f"some of {', '.join(formulas())}; all, and written to {RESULT.name}, if none"
    )
    chosen = parser.parse_args().formula
    text = table(chosen or list(formulas()))
    if not chosen:
        RESULT.write_text(
            _PAGE.format(version=triton.__version__, tile=triton_backend.TILE, table=text), encoding="utf-8"
        )
    print(text, end="")


_PAGE = """# The Triton kernels in machine code for Hopper

Made by `python -m bench.sm90` with Triton {version}, without a GPU: bf16, d_ff % 8 == 0, tiles of {tile} columns.
The budget is what an H200 can issue while the element's bytes move, at 4.3 TB/s. An instruction of the function unit (exp2,
log2, 1/x) occupies it for the time of 8 others. `statistics` is the forward that tells of itself; it runs every
`telemetry_every` steps and has no budget. No time was measured.

{table}"""

if __name__ == "__main__":
    main()
