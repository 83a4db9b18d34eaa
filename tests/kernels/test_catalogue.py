"""The catalogue: its sources, its figures against known ones, its page, its command; which arm a formula is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch

from kernels import FormulaError, activation
from kernels.catalogue import arms, table
from kernels.catalogue.__main__ import main
from kernels.catalogue.arms import PublishedArm, arm
from kernels.catalogue.likeness import Likeness, likeness
from kernels.common.errors import UserError
from kernels.formula import parse

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "catalogue.md"
LIBRARIES = {"vLLM", "SGLang", "Transformers", "llama.cpp", "Liger-Kernel", "flash-linear-attention"}
EPS = 2.0**-24


@pytest.fixture(scope="module")
def rows() -> list[table.ArmFigures]:
    return [table.row(each) for each in arms.arms()]


def row(name: str) -> table.ArmFigures:
    return table.row(arm(name))


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", arms.names())
def test_every_arm_has_a_source_with_a_year(name):
    assert re.search(r"\b(19|20)[0-9][0-9]\b", arm(name).source), (
        "the first line of its file is `# Author 2026 (arXiv ...)`"
    )


def test_every_file_is_named_as_its_arm():
    assert [each.name for each in arms.arms()] == arms.names()
    assert {"swiglu", "threshold", "xielu"} <= set(arms.names())
    assert "custom" not in arms.names()


def test_other_libraries_are_named_with_their_operator():
    named = [entry for each in arms.arms() for entry in each.also_in]
    assert {entry.partition(" ")[0] for entry in named} == LIBRARIES
    assert all(re.fullmatch(r"[\w.-]+ [\w=]+", entry) for entry in named)
    assert arm("swiglu").also_in[0] == "vLLM SiluAndMul"


HIDDEN_ACTS = [
    (each.name, act)
    for each in arms.arms()
    for entry in each.also_in
    if (act := entry.removeprefix("Transformers hidden_act="))
    not in (entry, "xielu")  # which rounds its numbers to bf16
]


@pytest.mark.parametrize(("name", "act"), HIDDEN_ACTS)
def test_transformers_computes_the_same(name, act):
    activations = pytest.importorskip("transformers.activations")
    formula = arm(name).formula
    points = 3 * torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    function = activations.ACT2FN[act].double()
    expected = function(points[0]) * points[1] if formula.gated else function(points[0])
    learned = {key: torch.tensor([p.init], dtype=torch.float64) for key, p in formula.learned.items()}
    actual = activation(formula)(points[None] if formula.gated else points[:1], **learned)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------- forms that are safe


def bounded(name: str, exact: Any, slope: Any, condition: Any) -> None:
    """Hold an arm in fp32 and in float64 to 30 digits, to a few roundings of x times `condition`, what one of them costs."""
    points = torch.cat([torch.linspace(-30, 30, 601, dtype=torch.float64), torch.tensor([-1e-7, 1e-7, -10.0, 10.0])])
    for dtype, eps in ((torch.float32, EPS), (torch.float64, 2.0**-53)):
        x = points.to(dtype).requires_grad_()
        h = activation(arm(name).formula)(x)
        (gradient,) = torch.autograd.grad(h.sum(), x)
        with mpmath.workdps(30):
            for point, value, of_slope in zip(x.tolist(), h.tolist(), gradient.tolist(), strict=True):
                allowed = 16 * eps * condition(mpmath.mpf(point))
                smallest = mpmath.mpf(torch.finfo(dtype).tiny)  # below it numbers have fewer digits
                true, true_slope = exact(mpmath.mpf(point)), slope(mpmath.mpf(point))
                assert abs(value - true) <= allowed * abs(true) + smallest, (dtype, point)
                assert abs(of_slope - true_slope) <= allowed * (abs(true_slope) + abs(true)) + 100 * smallest, (
                    dtype,
                    point,
                )


def test_golu_is_what_its_paper_says_where_that_overflows():
    def slope(x: Any) -> Any:
        return mpmath.exp(-mpmath.exp(-x)) * (1 + x * mpmath.exp(-x))

    # exp(-y) turns a rounding of y into y roundings, and the terms of the slope cancel where 1 = -x exp(-x).
    bounded("golu", lambda x: x * mpmath.exp(-mpmath.exp(-x)), slope, lambda x: (1 + mpmath.exp(-x)) ** 2)
    far = torch.tensor([-1e4, -100.0, -11.0], requires_grad=True)
    h = activation(arm("golu").formula)(far)
    h.sum().backward()
    assert not h.any()
    assert not far.grad.any()


def test_telu_is_what_its_paper_says_where_that_overflows():
    def slope(x: Any) -> Any:
        return mpmath.tanh(mpmath.exp(x)) + x * mpmath.exp(x) * mpmath.sech(mpmath.exp(x)) ** 2

    bounded("telu", lambda x: x * mpmath.tanh(mpmath.exp(x)), slope, lambda x: 1 + mpmath.exp(min(x, 2)) + abs(x))
    far = torch.tensor([11.0, 100.0, 1e4], requires_grad=True)
    h = activation(arm("telu").formula)(far)
    h.sum().backward()
    assert torch.equal(h, far)
    assert torch.equal(far.grad, torch.ones(3))


@pytest.mark.parametrize("formula", ["x*exp(-exp(-x))", "x*tanh(exp(x))"])
def test_as_they_stand_they_are_refused(formula):
    with pytest.raises(FormulaError, match="in 32-bit arithmetic"):
        assert activation(formula).compiled


def test_the_bound_of_powglu_keeps_its_gradient_finite_at_the_smallest_numbers():
    gate = torch.tensor([1e-45, 1e-39, 1e-30, 1e-13, 0.0, -1e-45, 1e-11, 0.5])
    unbounded = "where(gate > 0, gate**(3/(sqrt(gate)+1)), gate)*sigmoid(gate)*up"
    outputs, gradients = [], []
    for formula in (arm("powglu").formula, unbounded):
        pre = torch.stack([gate, torch.ones(8)])[None].requires_grad_()
        outputs.append(activation(formula, backend="reference")(pre))
        gradients.append(torch.autograd.grad(outputs[-1].sum(), pre)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-36)
    assert gradients[0].isfinite().all()
    assert not gradients[1].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("name", "curve", "monotone", "zeros"),
    [
        ("relu", "kink", ("rising",), 0.5),
        ("relu2", "smooth", ("rising",), 0.5),
        ("silu", "smooth", ("no",), 0.0),
        ("softplus", "smooth", ("rising",), 0.0),
        ("elu", "smooth", ("rising",), 0.0),
        ("selu", "kink", ("rising",), 0.0),
        ("threshold", "jump", ("rising",), 0.5),
        ("swiglu", "smooth", ("no", "rising"), 0.0),
        ("reglu", "kink", ("rising", "rising"), 0.5),
        ("drelu", "kink", ("rising", "rising"), 0.75),
        ("maxout", "kink", ("rising", "rising"), 0.0),
        ("swiglu_clamped_silu", "kink", ("no", "rising"), 0.0),  # at 10
        ("swiglu_clamped_output", "kink", ("no", "rising"), 0.0),  # at 16
        ("singlu", "smooth", ("no", "rising"), 0.0),
        ("polynorm", "smooth", ("rising",), 0.0),
        ("subnorm_glu", "smooth", ("rising", "rising"), 0.5),
    ],
)
def test_the_shape_of_a_curve_is_the_known_one(name, curve, monotone, zeros):
    found = row(name)
    assert (found.curve, found.monotone, found.zeros) == (curve, monotone, zeros)


def test_gaussian_top_k_leaves_one_in_twenty():
    assert row("gaussian_topk").zeros == pytest.approx(0.95, abs=0.01)


def test_a_falling_curve_falls():
    falling = PublishedArm("falling", parse("-softplus(x)"), "2026", (), {})
    assert table.row(falling).monotone == ("falling",)


def test_operations_and_bytes_are_counted():
    assert row("bilinear").operations == ((1, 0), (2, 0))
    assert row("sigmoid").operations[0] == (1, 1)
    assert (row("swiglu").moved, row("relu").moved) == ((6, 10), (4, 6))


# -------------------------------------------------------------------------------------------------------------- output


def test_the_page_is_what_the_command_prints(rows):
    """docs/catalogue.md holds it: python -m kernels.catalogue format=markdown makes it anew."""
    assert table.as_markdown(rows) in PAGE.read_text(encoding="utf-8")


def test_the_text_fits_80_columns_and_has_every_arm(rows):
    lines = table.as_text(rows).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert {line.split()[0] for line in lines if re.match(r"\S+ +[0-9]+ \(", line)} == set(arms.names())


def test_an_operator_stays_beside_its_library(capsys):
    main(["swiglu", "SwiGLU"])
    printed = capsys.readouterr().out
    assert "llama.cpp GGML_GLU_OP_SWIGLU" in printed
    assert "Liger-Kernel LigerSiLUMulFunction" in printed
    assert printed.count("silu(gate) * up") == 1
    assert "ungated" not in printed


@pytest.mark.parametrize("option", ["format=markdown", "--format=markdown"])
def test_chosen_arms_as_markdown(option, capsys):
    main(["prelu", option])
    printed = capsys.readouterr().out
    assert "| `prelu` | `where(x > 0, x, slope * x)`; slope learned from 0.25 | He 2015 (arXiv 1502.01852) |" in printed
    assert "swiglu" not in printed


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["swiglo"], "unknown arm 'swiglo': did you mean 'swiglu'"),
        (["custom"], "unknown arm 'custom'"),
        (["format=html"], "unknown format 'html': choose from markdown, text"),
        (["form=text"], "unknown option 'form': did you mean 'format'"),
        (["format="], "unknown format ''"),
    ],
)
def test_an_invalid_argument_is_one_sentence(argv, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        main(argv)


@pytest.mark.parametrize("argv", [[], ["swiglu"]])
def test_without_the_files_it_says_where_they_are(argv, monkeypatch, tmp_path):
    monkeypatch.setattr(arms, "_FOLDERS", (tmp_path / "nowhere",))
    arms.arms.cache_clear()
    try:
        with pytest.raises(UserError, match=re.escape("they are the files of conf/ffn in the repository")):
            main(argv)
        assert not arms.can_be_read()
    finally:
        arms.arms.cache_clear()


def test_without_pyyaml_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert not arms.can_be_read()
    with pytest.raises(UserError, match="pip install pyyaml"):
        main(["swiglu"])


def test_the_installed_package_brings_its_arms(tmp_path):
    """As the wheel lays it out: the files of conf/ffn are the folder `arms`."""
    package = tmp_path / "formula_ffn"
    shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf" / "ffn", package / "arms")
    code = """
import runpy, sys
for sys.argv in (["catalogue", "--help"], ["catalogue", "geglu"], ["show", "x*sigmoid(x)"]):
    try:
        runpy.run_module(f"formula_ffn.{sys.argv[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert ended.code == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "    python -m formula_ffn.catalogue swiglu geglu reglu\n" in done.stdout
    assert "    gelu(gate) * up\n    Shazeer 2020" in done.stdout
    assert "silu: Elfwing 2017 (arXiv 1702.03118)" in done.stdout


# ---------------------------------------------------------------------------------------------------- which arm it is


def learned(start: float, share: str = "layer") -> dict[str, Any]:
    return {"init": start, "share": share}


def names_of(formula: str, **parameters: Any) -> dict[str, list[str]]:
    """Return the lists of `likeness` that are not empty, as names."""
    found = likeness(parse(formula, parameters), arms.arms())
    lists = {field: getattr(found, field) for field in Likeness.__dataclass_fields__}
    return {field: [each.name for each in of_field] for field, of_field in lists.items() if of_field}


@pytest.mark.parametrize("name", arms.names())
def test_every_arm_is_itself_and_no_other(name):
    found = likeness(arm(name).formula, arms.arms())
    assert [each.name for each in found.same] == [name]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("x*sigmoid(x)", {"same": ["silu"], "at_start": ["swish"]}),
        ("x/(1+exp(-x))", {"same": ["silu"], "at_start": ["swish"]}),
        ("0.5*x*(1+erf(x/sqrt(2)))", {"same": ["gelu"]}),
        ("0.5*x*(1 + tanh(sqrt(2/pi)*(x + 0.044715*x**3)))", {"same": ["gelu_tanh"]}),
        ("max(x, 0)**2", {"same": ["relu2"]}),
        ("log(1 + exp(x))", {"same": ["softplus"]}),
        ("0.5*x*(x + sqrt(x**2 + 0.04))", {"same": ["smooth_relu2"]}),
        ("gate*up*sigmoid(gate)", {"same": ["swiglu"], "at_start": ["xswiglu"]}),
        ("silu(up)*gate", {"exchanged": ["swiglu", "xswiglu"]}),
        ("where(gate > 0, gate**(3/(sqrt(gate)+1)), gate)*sigmoid(gate)*up", {"same": ["powglu"]}),
        ("x*sigmoid(1.702*x)", {"by_constants": ["silu", "swish"]}),
        ("x*sigmoid(1.000001*x)", {"by_constants": ["silu", "swish"]}),
        ("silu(min(gate, 9))*clip(up, -9, 9)", {"by_constants": ["swiglu_clamped_silu"]}),
        ("min(gate,5)*sigmoid(2*min(gate,5))*(clip(up,-5,5)+1)", {"by_constants": ["swiglu_clamped"]}),
        ("where(x > 0, x, 0.3*x)", {"by_constants": ["leaky_relu", "prelu"]}),
        ("2*where(x > 0, x, 3*expm1(x))", {"by_constants": ["elu", "selu"]}),
        # Like an arm, and none: a clamp far out, another function, a bound just below 0, another value at 0.
        ("silu(min(gate, 5000))*up", {}),
        ("gelu_tanh(gate)*up", {}),
        ("where(x > 0, 0.8*x**2, 0.8*(expm1(min(x, -1e-6)) - x)) + 0.5*x", {}),
        ("where(x > 0, 1, 0)", {}),
        ("x*atan(x)", {}),
        ("relu(x)**3", {}),
    ],
)
def test_a_formula_is_the_arms_that_compute_the_same(formula, expected):
    assert names_of(formula) == expected


def test_what_is_learned_has_to_be_the_same():
    assert names_of("x*sigmoid(b*x)", b=learned(1.0)) == {"same": ["swish"], "at_start": ["silu"]}
    assert names_of("x*sigmoid(b*x)", b=learned(1.0, "channel")) == {"at_start": ["silu", "swish"]}
    assert names_of("x*sigmoid(b*x)", b=learned(2.0)) == {"by_constants": ["silu", "swish"]}
    assert names_of("x*sigmoid(x + b - 1)", b=learned(1.0)) == {"at_start": ["silu", "swish"]}


def test_parameters_may_have_other_names_and_another_order():
    third = learned(1 / 3)
    assert names_of("(p*relu(gate) + q*silu(gate) + r*gelu(gate))*up", p=third, q=third, r=third) == {
        "same": ["mixture_glu"]
    }
    changed = names_of("(p*relu(gate) + q*silu(gate) + r*gelu(gate))*up", p=learned(0.5), q=third, r=third)
    assert changed == {"by_constants": ["mixture_glu"]}
    # ap and an are told apart by what they do, and by where they start.
    xielu = "where(x > 0, softplus(n)*x**2, (0.5 + softplus(p))*(expm1(x) - x)) + 0.5*x"
    assert names_of(xielu, n=learned(0.20338), p=learned(-1.05022))["same"] == ["xielu"]
    assert "xielu" in names_of(xielu, n=learned(-1.05022), p=learned(0.20338))["by_constants"]
