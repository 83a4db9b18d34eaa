"""The Triton backend without a GPU: what the compiler makes of every kernel, for Hopper and others, and what it lacks."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

import pytest
import torch

from kernels import activation, parse
from kernels.activations import triton_backend, triton_source
from kernels.c import toolchain
from kernels.formula.compiled import compile_formula
from kernels.triton import runtime
from tests.kernels.test_triton import FORMULAS
from tests.selection import quick

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# --------------------------------------------------------------------------------------------------------------- compiled


def test_without_a_gpu_it_refuses_by_name_and_auto_takes_another():
    function = activation("relu(x)", backend="triton")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16 on an NVIDIA GPU, not float32 on cpu"):
        function(torch.zeros(3))
    assert activation("relu(x)")(torch.ones(3)).tolist() == [1, 1, 1]


OTHER_GPUS = {80: "Ampere", 100: "Blackwell of data centers", 120: "Blackwell of workstations"}


@pytest.mark.parametrize("capability", quick(list(OTHER_GPUS), 120), ids=lambda capability: f"sm_{capability}")
def test_every_kind_of_kernel_compiles_for_other_gpus(capability):
    """Of a formula, gated and with a learned parameter; of the norm, the rotation and the loss."""
    from bench.sm90 import _kind, machine_code
    from kernels.cross_entropy import triton as loss
    from kernels.norm import triton as norm
    from kernels.rotary import triton as rotary

    built = []
    formula = parse("silu(b * gate) * up", {"b": {"init": 1.0, "share": "channel"}})
    module = runtime.load(triton_source.source(compile_formula(formula)))
    for kernel in (module.forward, module.backward_with_h):
        kinds = {argument: _kind(argument, torch.bfloat16) for argument in kernel.arg_names}
        constants = {"UNIT": 8, "TILE": triton_backend.TILE}
        built.append(machine_code(kernel, kinds, constants, triton_backend.WARPS, capability=capability))
    fp32 = {"rstd", "sums", "nats", "lse", "cos", "sin"}
    scalars = {
        "eps": "fp32",
        "direction": "fp32",
        "z_loss": "fp32",
        "cap": "fp32",
        "first": "i64",
        "ignore": "i64",
        "targets": "*i64",
    }
    tensors = {"x", "residual", "weight", "y", "s", "dy", "ds", "dx", "logits", "out", "q"} | fp32
    flags = {"MEASURE": True, "DIFFERENTIATE": True, "SHARDED": False, "CAPPED": False, "ADD": True, "ROWS": 2}
    flags |= {"HEADS": 8, "PAIRS": 64}
    for kernel in (norm.forward_kernel, norm.backward_kernel, rotary.rotate_kernel, loss.cross_entropy_kernel):
        kinds = {
            name: "constexpr" if name.isupper()
            else scalars.get(name) or (f"*{'fp32' if name in fp32 else 'bf16'}" if name in tensors else "i32")
            for name in kernel.arg_names
        }  # fmt: skip
        constants = {name: flags.get(name, 1024) for name in kernel.arg_names if name.isupper()}
        built.append(machine_code(kernel, kinds, constants, 4, capability=capability))
    assert not any(code.spilled for code in built)
    assert all(code.registers > 8 for code in built)


MISSING = {
    "triton": ("the package triton is not installed: pip install triton", {"installed": lambda: False}),
    "a compiler": ("there is no C compiler", {"find_compiler": lambda: None}),
    "Python.h": (
        "has no Python.h \\(apt install python3",
        {"find_compiler": lambda: "cc", "get_paths": lambda _: {"include": "/none"}},
    ),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_triton_lacks_is_found_before_the_first_launch(monkeypatch, missing):
    """Triton itself looks for a compiler and for Python.h when a kernel is launched, in the first step."""
    text, patches = MISSING[missing]
    for name, function in patches.items():
        owner = {"installed": runtime, "find_compiler": toolchain, "get_paths": toolchain.sysconfig}[name]
        monkeypatch.setattr(owner, name, function)
    for cached in (runtime.problem, runtime.warn_if_missing):
        cached.cache_clear()
    try:
        with pytest.raises(ImportError, match=f"the Triton backend cannot run: .*{text}"):
            activation("relu(x)", backend="triton").prepare(torch.device("cpu"), torch.float32)
        with pytest.warns(UserWarning, match=f"no Triton kernels, slower plain PyTorch computes instead: .*{text}"):
            runtime.warn_if_missing()
    finally:
        for cached in (runtime.problem, runtime.warn_if_missing):
            cached.cache_clear()


def test_a_damaged_file_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "folder", lambda: tmp_path)
    text = triton_source.source(compile_formula(parse("relu(x)")))
    runtime.load.__wrapped__(text)
    (path,) = tmp_path.glob("*.py")
    path.write_text("half of", encoding="utf-8")
    assert runtime.load.__wrapped__(text).forward
    assert path.read_text(encoding="utf-8") == text
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".pyc" and each.is_file()] == [path.name]


def check_machine_code(name: str) -> None:
    from bench.sm90 import offline

    for kernel in offline(compile_formula(parse(*FORMULAS[name])), torch.bfloat16):
        if name not in WITH_SLOW_PATH:
            assert not kernel.spilled, kernel
            assert kernel.loads in (128, 0), kernel  # 0: nothing is read for a gradient that is 0 everywhere
        assert kernel.stores == 128, kernel
        if of_the_page():
            assert kernel.fits == ((name, kernel.name) not in OVER_BUDGET), kernel


def of_the_page() -> bool:
    """Whether the installed Triton is the one that bench/results/sm90.md was made with: others count other instructions."""
    from bench.sm90 import RESULT

    return f"with Triton {metadata.version('triton')}, " in RESULT.read_text(encoding="utf-8")


# By how much: bench/results/sm90.md.
OVER_BUDGET = {
    *(("situ_glu", "forward"), ("smooth_relu2", "backward"), ("tanh_log", "forward"), ("x_atan", "forward")),
    *((name, kernel) for name in ("powglu", "singlu") for kernel in ("forward", "backward", "backward_with_h")),
}
# Triton's own sine of large arguments keeps 32 bytes in local memory and reads a table; almost no tile runs it, and its
# instructions are counted all the same.
WITH_SLOW_PATH = ("singlu",)


@pytest.mark.parametrize("name", quick(FORMULAS, "swiglu"))
def test_machine_code_for_hopper(name):
    """No spills, 128 bits a load and store where 8 divides d_ff, and no more instructions than the memory leaves time for."""
    check_machine_code(name)


def test_rows_of_odd_widths_are_not_read_128_bits_at_once():
    from bench.sm90 import offline

    assert {kernel.loads for kernel in offline(compile_formula(parse("x")), width_is_multiple_of_8=False)} == {16}


def test_the_page_has_what_the_compiler_says_now():
    """Of one formula: the file is made by `python -m bench.sm90`."""
    from bench.sm90 import RESULT, table

    if not of_the_page():
        pytest.skip("the page was made with another Triton: python -m bench.sm90 makes it anew")
    row = next(line for line in table(["swiglu"]).splitlines() if "| forward |" in line)
    assert row in RESULT.read_text(encoding="utf-8")


def test_machine_code_is_counted_without_padding_and_in_the_loop():
    from bench.sm90 import _bits, _hot, instructions

    code = """
        /*0000*/                   S2R R0, SR_TID.X ;   /* 0x0 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/               @P1 BRA 0x50 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
    """
    assert [at for at, _ in instructions(code)] == list(range(0, 0xB0, 0x10))
    assert len(_hot(instructions(code))) == 4  # the loop that stores; the longer one is a slow path
    assert _bits(_hot(instructions(code)), "LDG") == [16, 128]
    assert re.search("PRECISE", triton_source.source(compile_formula(parse("x"))))
