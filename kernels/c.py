"""The C backend: a formula's programs printed as C, compiled once by the machine's own compiler, called through ctypes.

Notable here:
- fp32 inside, one rounding at the store; bf16 and fp32 tensors on a CPU
- every function of the grammar is inlined arithmetic (`primitives.h`), which the compiler vectorises
- the work is cut into blocks that do not depend on the number of threads, so results do not either
- built libraries are kept by a hash of source, compiler and CPU; a damaged one is built again, and two processes that
  build the same one do not meet
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.cache import folder
from kernels.program import Argument, Program
from kernels.symbolic import Compiled

_FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-x", "c", "-std=gnu11")
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_PRINTED = {
    **{"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}"},
    **{"gt": "{} > {}", "ge": "{} >= {}"},
}

_SHORT = ("div", "exp", "expm1", "sigmoid", "tanh", "erf")  # have a shorter form that is exact enough for bf16


def serves(pre: Tensor) -> bool:
    """Whether tensors of this kind can be computed here."""
    return pre.device.type == "cpu" and pre.dtype in _DTYPES


@functools.lru_cache(maxsize=256)
def _library(source: str) -> ctypes.CDLL | None:
    try:
        return build(source)
    except OSError as error:
        warnings.warn(
            f"no C kernels, the slower reference backend computes the activation instead: {error}", stacklevel=2
        )
        return None


def library(compiled: Compiled) -> Library | None:
    """Return the kernels of a formula, built if need be; None (and one warning a process) where no compiler works."""
    if not _Compiler.works:
        return None
    built = _library(source(compiled))
    if built is None:
        _Compiler.works = False
        return None
    return Library(compiled, built)


class _Compiler:
    """Whether the compiler has served so far: a machine without one is told so once."""

    works = True


class Library:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled, built: ctypes.CDLL) -> None:
        self.built = built
        self.matrices = len(compiled.formula.pre_activations)
        self.shares = [learned.share for learned in compiled.formula.learned.values()]

    def forward(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """See `reference.forward`."""
        width = pre.shape[-1]
        h = torch.empty(pre.shape if self.matrices == 1 else (*pre.shape[:-2], width), dtype=pre.dtype)
        if h.numel():
            values = self._values(learned)
            function = getattr(self.built, f"forward_{_DTYPES[pre.dtype]}")
            function(*_addresses(pre, h, *values), *map(ctypes.c_int64, (h.numel() // width, width)))
        return h

    def backward(
        self, _: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """See `reference.backward`."""
        width, dpre = pre.shape[-1], torch.empty_like(pre)
        h = torch.empty_like(dh) if with_h else None
        dlearned = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in learned]
        if dh.numel():
            values = self._values(learned)
            function = getattr(self.built, f"backward{'_h' if with_h else ''}_{_DTYPES[pre.dtype]}")
            tensors = (pre, dh, dpre, *([h] if h is not None else []), *values, *dlearned)
            failed = function(*_addresses(*tensors), *map(ctypes.c_int64, (dh.numel() // width, width)))
            if failed:
                raise MemoryError("no memory for the partial sums of the learned parameters")
        return dpre, h, dlearned

    def _values(self, learned: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.detach().to(torch.float32).contiguous() for tensor in learned]


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------- printing


def source(compiled: Compiled) -> str:
    """Return the C source of a formula's kernels."""
    parts = [f"// {' '.join(compiled.formula.text.split())}", _PRIMITIVES.read_text(encoding="utf-8")]
    for dtype in _DTYPES.values():
        parts.append(_forward(compiled, dtype))
        parts.append(_backward(compiled, dtype, with_h=False))
        parts.append(_backward(compiled, dtype, with_h=True))
    return "\n".join(parts)


_PRIMITIVES = Path(__file__).with_name("primitives.h")


def _body(program: Program, dtype: str, indent: str) -> str:
    lines = []
    for line in program.lines:
        printed = [_argument(argument) for argument in line.arguments]
        if dtype == "bf16" and line.operation in _SHORT:
            text = f"k_{line.operation}_bf16({', '.join(printed)})"
        elif line.operation in _PRINTED:
            text = _PRINTED[line.operation].format(*printed)
        else:
            text = f"k_{line.operation}({', '.join(printed)})"
        lines.append(f"{indent}const {'I' if line.operation in ('gt', 'ge') else 'V'} {line.name} = {text};\n")
    return "".join(lines)


def _argument(argument: Argument) -> str:
    return argument if isinstance(argument, str) else f"number({float(argument).hex()}f)"


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What a loop reads or writes element by element: its name in the program, its type, and where a tile of it begins."""

    name: str
    dtype: str
    address: str  # of the first element of the tile (row, first)


def _forward(compiled: Compiled, dtype: str) -> str:
    names = compiled.formula.pre_activations
    reads = _pre_streams(names, dtype) + _channel_streams(compiled)
    return _kernel(
        compiled, compiled.forward, f"forward_{dtype}", reads, [_Stream("h", dtype, "h + row * width + first")], dtype
    )


def _backward(compiled: Compiled, dtype: str, with_h: bool) -> str:
    names = compiled.formula.pre_activations
    reads = [*_pre_streams(names, dtype), _Stream("dh", dtype, "dh + row * width + first"), *_channel_streams(compiled)]
    writes = [
        _Stream(f"d{name}", dtype, f"dpre + (row * {len(names)} + {i}) * width + first") for i, name in enumerate(names)
    ]
    if with_h:
        writes.append(_Stream("h", dtype, "h + row * width + first"))
    program = compiled.backward_with_h if with_h else compiled.backward
    return _kernel(compiled, program, f"backward{'_h' if with_h else ''}_{dtype}", reads, writes, dtype)


def _pre_streams(names: Sequence[str], dtype: str) -> list[_Stream]:
    return [_Stream(name, dtype, f"pre + (row * {len(names)} + {i}) * width + first") for i, name in enumerate(names)]


def _channel_streams(compiled: Compiled) -> list[_Stream]:
    return [_Stream(n, "f32", f"p_{n} + first") for n, p in compiled.formula.learned.items() if p.share == "channel"]


def _kernel(
    compiled: Compiled, program: Program, name: str, reads: list[_Stream], writes: list[_Stream], dtype: str
) -> str:
    """Return one kernel: a loop over a tile in whole vectors, and the function that cuts the work into tiles.

    A row's last few elements go through the same loop by way of padded copies. With learned parameters the rows are cut into
    blocks with sums of their own, which are added up at the end in their order: no result depends on the number of threads.
    """
    learned = compiled.formula.learned if "dh" in program.inputs else {}
    scalars = [n for n, p in compiled.formula.learned.items() if p.share == "layer"]
    sums = {n: ("width" if p.share == "channel" else "1") for n, p in learned.items()}
    offsets = {n: " + ".join(list(sums.values())[:i]) or "0" for i, n in enumerate(sums)}
    totals = [
        _Stream(f"d{n}", "f32", f"mine + {offsets[n]} + first") for n, p in learned.items() if p.share == "channel"
    ]
    loop_arguments = [f"const {s.dtype} *restrict r_{s.name}" for s in reads]
    loop_arguments += [f"{s.dtype} *restrict w_{s.name}" for s in (*writes, *totals)]
    loop_arguments += [f"const float p_{n}" for n in scalars] + [
        f"float *restrict s_{n}" for n in scalars if n in learned
    ]
    loop = f"""
static void {name}_tile({", ".join(loop_arguments)}, int64_t n) {{
{"".join(f"    V sum_{n} = {{}};" + chr(10) for n in scalars if n in learned)}\
    for (int64_t c = 0; c < n; c += LANES) {{
{"".join(f"        const V {s.name} = load_{s.dtype}(r_{s.name} + c);" + chr(10) for s in reads if s.name in program.used)}\
{"".join(f"        const V {n} = number(p_{n});" + chr(10) for n in scalars if n in program.used)}\
{_body(program, dtype, "        ")}\
{"".join(f"        store_{s.dtype}(w_{s.name} + c, {_argument(program.outputs[s.name])});" + chr(10) for s in writes)}\
{"".join(f"        add_f32(w_{s.name} + c, {_argument(program.outputs[s.name])});" + chr(10) for s in totals)}\
{"".join(f"        sum_{n} += {_argument(program.outputs[f'd{n}'])};" + chr(10) for n in scalars if n in learned)}\
    }}
{"".join(f"    *s_{n} += sum(sum_{n});" + chr(10) for n in scalars if n in learned)}\
}}
"""
    call = f"{name}_tile("
    tail = [f"p_{n}[0]" for n in scalars] + [f"mine + {offsets[n]}" for n in scalars if n in learned]
    in_place = ", ".join([s.address for s in (*reads, *writes, *totals)] + tail)
    padded = ", ".join([f"b_{s.name}" for s in (*reads, *writes, *totals)] + tail)
    shifted = {s.name: f"{s.address} + whole" for s in (*reads, *writes, *totals)}
    bytes_ = {s.name: f"rest * sizeof({s.dtype})" for s in (*reads, *writes, *totals)}
    tile = f"""
            const int64_t first = tile * TILE_WIDTH, size = width - first < TILE_WIDTH ? width - first : TILE_WIDTH;
            const int64_t whole = size / LANES * LANES, rest = size - whole;
            {call}{in_place}, whole);
            if (rest) {{
{"".join(f"                {s.dtype} b_{s.name}[LANES] = {{0}};" + chr(10) for s in (*reads, *writes, *totals))}\
{"".join(f"                memcpy(b_{s.name}, {shifted[s.name]}, {bytes_[s.name]});" + chr(10) for s in (*reads, *totals))}\
                {call}{padded}, LANES);
{"".join(f"                memcpy({shifted[s.name]}, b_{s.name}, {bytes_[s.name]});" + chr(10) for s in (*writes, *totals))}\
            }}"""
    arguments = [f"const {dtype} *restrict pre"]
    if name.startswith("backward"):
        arguments += [f"const {dtype} *restrict dh", f"{dtype} *restrict dpre"]
    if any(s.name == "h" for s in writes):
        arguments.append(f"{dtype} *restrict h")
    arguments += [f"const float *restrict p_{n}" for n in compiled.formula.learned]
    arguments += [f"float *restrict d_{n}" for n in learned]
    head = f"int {name}({', '.join(arguments)}, int64_t rows, int64_t width)"
    if not learned:
        return f"""{loop}
{head} {{
    const int64_t across = (width + TILE_WIDTH - 1) / TILE_WIDTH;
    PARALLEL_FOR(rows * width)
    for (int64_t work = 0; work < rows * across; work++) {{
        const int64_t row = work / across, tile = work % across;
        {{{tile}
        }}
    }}
    return 0;
}}
"""
    return f"""{loop}
{head} {{
    const int64_t across = (width + TILE_WIDTH - 1) / TILE_WIDTH;
    const int64_t blocks = rows < {_BLOCKS} ? rows : {_BLOCKS}, space = {" + ".join(sums.values())};
    float *const partial = calloc(blocks * space, sizeof(float));
    if (!partial) return 1;
    PARALLEL_FOR(rows * width)
    for (int64_t block = 0; block < blocks; block++) {{
        float *const mine = partial + block * space;
        for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; row++)
        for (int64_t tile = 0; tile < across; tile++) {{{tile}
        }}
    }}
{"".join(f"    add_up(d_{n}, partial + {offsets[n]}, {size}, blocks, space);" + chr(10) for n, size in sums.items())}\
    free(partial);
    return 0;
}}
"""


_BLOCKS = 64


# ---------------------------------------------------------------------------------------------------------------- building


def build(text: str) -> ctypes.CDLL:
    """Compile C source, or find what an earlier process compiled, and load it.

    Raises:
        OSError: no compiler, or it failed.
    """
    compiler = (
        shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc or clang)")
    identity = "\n".join((text, compiler, _version(compiler), _cpu(), *_FLAGS))
    name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    kept = folder()
    path = kept / f"{name}.so"
    with _locked(kept / f"{name}.lock"):
        if not _intact(path):
            _compile(compiler, text, path)
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
        yield


def _intact(path: Path) -> bool:
    """Whether a library is the one that was written: loading half of one can end the process."""
    with contextlib.suppress(OSError):
        return path.with_suffix(".sum").read_text(encoding="utf-8") == _sum(path)
    return False


def _sum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _compile(compiler: str, text: str, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *_FLAGS, "-", "-o", str(partial), "-lm"]
    try:
        done = subprocess.run([*command[:1], "-fopenmp", *command[1:]], input=text, capture_output=True, text=True)
        if done.returncode:  # a compiler without OpenMP still gives kernels, for one thread
            done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise OSError(f"{compiler} failed: {said[0]}")
        checksum = path.with_suffix(".sum")
        checksum.unlink(missing_ok=True)
        os.replace(partial, path)
        checksum.write_text(_sum(path), encoding="utf-8")
    finally:
        partial.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4)
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    """Return what `-march=native` depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()
