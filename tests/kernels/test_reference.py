"""What formulas compute: every arm and every function against an independent formula in float64, gradients, dtypes, layout."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from kernels import FormulaError, activation, parse
from kernels.formula.grammar import FUNCTIONS

FFN = Path(__file__).parents[2] / "conf" / "ffn"
erf = np.vectorize(math.erf)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return (1 + erf(x / math.sqrt(2))) / 2


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def xielu(x: np.ndarray, alpha_p: float, alpha_n: float) -> np.ndarray:
    assert abs(alpha_p - 0.8) < 1e-4 > abs(alpha_n - 0.8)
    return np.where(x > 0, alpha_p * x * x, alpha_n * (np.expm1(np.minimum(x, 0)) - x)) + 0.5 * x


# Over d_ff, the last axis; the epsilon is that of PolyCom.
def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(-1, keepdims=True)


def std(x: np.ndarray) -> np.ndarray:
    return x.std(-1, keepdims=True)


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(mean(x * x) + 1e-6)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Each arm from its paper, by hand.
ARMS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * normal_cdf(x),
    "silu": lambda x: x * sigmoid(x),
    "glu": lambda gate, up: sigmoid(gate) * up,
    "bilinear": lambda gate, up: gate * up,
    "reglu": lambda gate, up: np.maximum(gate, 0) * up,
    "geglu": lambda gate, up: gate * normal_cdf(gate) * up,
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "threshold": lambda x: np.where(x >= 0, 1.0, 0.0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "prelu": lambda x: np.where(x > 0, x, 0.25 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "softplus": lambda x: np.logaddexp(x, 0),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "swish": lambda x: x * sigmoid(x),
    "gelu_tanh": gelu_tanh,
    "leaky_relu2": lambda x: np.where(x > 0, x, 0.5 * x) ** 2,
    "smooth_relu2": lambda x: x * (x + np.sqrt(x * x + 0.04)) / 2,
    "tanh_relu2": lambda x: (16 * np.tanh(np.maximum(x, 0) / 16)) ** 2,
    "xielu": lambda x: xielu(x, softplus(0.20338), 0.5 + softplus(-1.05022)),
    "xielu_positive": lambda x: xielu(x, softplus(0.20343), softplus(0.20343)),
    "reglu2": lambda gate, up: np.maximum(gate, 0) ** 2 * up,
    "swiglu_clamped": lambda gate, up: (
        np.minimum(gate, 7) * sigmoid(1.702 * np.minimum(gate, 7)) * (np.clip(up, -7, 7) + 1)
    ),
    "situ_glu": lambda gate, up: 4 * np.tanh(gate / 4) * sigmoid(gate) * 25 * np.tanh(up / 25),
    "maxout": np.maximum,
    "silu_plus_relu": lambda x: x * sigmoid(x) + (x > 0) * x,
    "powglu": lambda gate, up: (
        sigmoid(gate) * up * np.where(gate > 0, np.abs(gate) ** (3 / (np.abs(gate) ** 0.5 + 1)), gate)
    ),
    "swiglu_clamped_silu": lambda gate, up: np.minimum(gate, 10) * sigmoid(np.minimum(gate, 10)) * np.clip(up, -10, 10),
    "swiglu_clamped_output": lambda gate, up: np.minimum(gate * sigmoid(gate), 16) * np.clip(up, -16, 16),
    "xiprelu": lambda x: softplus(0.20343) * x * x + 0.5 * x,  # while both alphas are equal
    "double_swiglu": lambda gate, up: gate * sigmoid(gate) * up * sigmoid(up),
    "sigmoid_tanh": lambda gate, up: sigmoid(gate) * np.tanh(up),
    "drelu": lambda gate, up: np.maximum(gate, 0) * np.maximum(up, 0),
    "mixture_glu": lambda gate, up: (gate * sigmoid(gate) + gate * normal_cdf(gate) + np.maximum(gate, 0)) / 3 * up,
    "polyrelu": lambda x: (x > 0) * (x + x**2 + x**3) / 3,
    "xswiglu": lambda gate, up: gate * sigmoid(gate) * up,  # while the range of the gate is (0, 1)
    "singlu": lambda gate, up: np.sin(gate) * up,
    "golu": lambda x: x * np.exp(-np.exp(-x)),
    "telu": lambda x: x * np.tanh(np.exp(x)),
    "polynorm": lambda x: (norm(x**3) + norm(x**2) + norm(x)) / 3,
    "gaussian_topk": lambda gate, up: gelu_tanh(np.maximum(gate - mean(gate) - 1.6448536269514722 * std(gate), 0)) * up,
    "subnorm_glu": lambda gate, up: norm(np.maximum(gate, 0) ** 2 * up),
}


# Each function of the grammar as (formula, the same by hand); its points are `POINTS`, or their absolute values.
FUNCTIONS_BY_HAND = {
    "abs": ("abs(x)", np.abs),
    "sign": ("sign(x)", np.sign),
    "sqrt": ("sqrt(abs(x) + 1e-3)", lambda x: (np.abs(x) + 1e-3) ** 0.5),
    "exp": ("exp(x)", np.exp),
    "expm1": ("expm1(x)", np.expm1),
    "log": ("log(abs(x) + 1e-3)", lambda x: np.log(np.abs(x) + 1e-3)),
    "log1p": ("log1p(abs(x))", lambda x: np.log1p(np.abs(x))),
    "sigmoid": ("sigmoid(x)", sigmoid),
    "tanh": ("tanh(x)", np.tanh),
    "sin": ("sin(x)", np.sin),
    "cos": ("cos(x)", np.cos),
    "atan": ("atan(x)", np.arctan),
    "erf": ("erf(x)", erf),
    "softplus": ("softplus(x)", lambda x: np.logaddexp(x, 0)),
    "relu": ("relu(x)", lambda x: np.where(x > 0, x, 0)),
    "silu": ("silu(x)", lambda x: x / (1 + np.exp(-x))),
    "gelu": ("gelu(x)", lambda x: x * normal_cdf(x)),
    "gelu_tanh": (
        "gelu_tanh(x)",
        lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "max": ("max(x, 1 - x)", lambda x: np.maximum(x, 1 - x)),
    "min": ("min(x, 0.5)", lambda x: np.minimum(x, 0.5)),
    "where": ("where(x > 0.25, x, 0.25 * x)", lambda x: x * (0.25 + 0.75 * (x > 0.25))),
    "clip": ("clip(x, -1, 2)", lambda x: np.clip(x, -1, 2)),
}
OPERATORS = {
    "x + 2 * x - x / 4": lambda x: 2.75 * x,
    "x ** 3 - -x ** 2": lambda x: x**3 + x**2,
    "(abs(x) + 1) ** 0.5": lambda x: (np.abs(x) + 1) ** 0.5,
    "abs(x) ** 1.5": lambda x: np.abs(x) ** 1.5,
    "(x * x + 1) ** (0.1 * x)": lambda x: (x * x + 1) ** (0.1 * x),
    "1 / (1 + x * x)": lambda x: 1 / (1 + x * x),
    "2 ** x": lambda x: 2.0**x,
    "pi * x": lambda x: np.pi * x,
    "where(x < 0, 1, 2) * where(x <= 0, 1, 2)": lambda x: (2.0 - (x < 0)) * (2.0 - (x <= 0)),
    "where(x > 0, 1, 2) * where(x >= 0, 1, 2)": lambda x: (2.0 - (x > 0)) * (2.0 - (x >= 0)),
    "x*sigmoid(1.702*x)": lambda x: x / (1 + np.exp(-1.702 * x)),
}
POINTS = torch.cat((torch.linspace(-30, 30, 601, dtype=torch.float64), torch.tensor([0.0, 1e-30, -1e-30, 1e-8, -1e-8])))
# A few roundings of float64 each in the two ways to compute it, and the cancellation of 1 + erf(x) in the formula by hand.
TOLERANCE = {"rtol": 1e-13, "atol": 1e-14}


def arm_of(name: str) -> tuple[str, dict]:
    """Return formula and parameters of an arm of conf/ffn."""
    stored = yaml.safe_load((FFN / f"{name}.yaml").read_text(encoding="utf-8"))
    return stored["formula"], stored.get("parameters", {})


GATED = {arm for arm in ARMS if parse(*arm_of(arm)).gated}


def compute(name: str, pre: Tensor) -> Tensor:
    """Compute an arm with what it learns at its start."""
    function = activation(*arm_of(name))
    learned = {key: torch.full((1,), p.init, dtype=pre.dtype) for key, p in function.formula.learned.items()}
    return function(pre, **learned)


def test_every_arm_has_its_formula_by_hand():
    assert set(ARMS) == {path.stem for path in FFN.glob("*.yaml")} - {"custom"}


def pre_activations(arm: str, dtype: torch.dtype = torch.float64, rows: int = 5) -> Tensor:
    """Return (rows, d_ff), or (rows, 2, d_ff) for a gated arm."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 2, 64) if arm in GATED else (rows, 64)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def by_hand(arm: str, pre: Tensor) -> Tensor:
    parts = pre.double().numpy()
    return torch.from_numpy(ARMS[arm](parts[:, 0], parts[:, 1]) if parts.ndim == 3 else ARMS[arm](parts))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_what_its_paper_says_gate_first(arm):
    pre = pre_activations(arm)
    h = compute(arm, pre)
    torch.testing.assert_close(h, by_hand(arm, pre), **TOLERANCE)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_of_the_grammar(name):
    formula, expected = FUNCTIONS_BY_HAND[name]
    torch.testing.assert_close(activation(formula)(POINTS), torch.from_numpy(expected(POINTS.numpy())), **TOLERANCE)


@pytest.mark.parametrize("formula", OPERATORS)
def test_every_operator(formula):
    expected = OPERATORS[formula](POINTS.numpy())
    torch.testing.assert_close(activation(formula)(POINTS), torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.parametrize("arm", ARMS)
def test_the_gradients_of_every_arm(arm):
    pre = pre_activations(arm, rows=1)[..., :24].clone().requires_grad_()  # a call for each number
    assert torch.autograd.gradcheck(lambda pre: compute(arm, pre), pre)


@pytest.mark.parametrize("formula", [formula for formula, _ in FUNCTIONS_BY_HAND.values()])
def test_the_gradient_of_every_function(formula):
    points = torch.linspace(-2.9, 3.1, 16, dtype=torch.float64, requires_grad=True)  # away from kinks and steps
    if formula == "sign(x)":
        assert activation("sign(x) + 0*x")(points).sum().isfinite()
        return
    assert torch.autograd.gradcheck(activation(formula), points)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "formula",
    [
        *(formula for formula, _ in FUNCTIONS_BY_HAND.values()),
        *OPERATORS,
        "where(x > 0, 1, 0)",
        "where(1 > 0, x, 2)",
        "where(where(x > 0, 1, 0) > 0, 1, 0.01) * x",
        "exp(1) * sqrt(2 / pi) * x",
    ],
)
def test_the_dtype_and_the_shape_are_kept(formula, dtype):
    pre = torch.randn(3, 4, dtype=dtype)
    h = activation(formula)(pre)
    assert (h.dtype, h.shape) == (dtype, pre.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arm", ["relu", "relu2", "gelu", "silu", "glu", "bilinear", "reglu", "geglu", "swiglu"])
def test_low_precision_errs_no_more_than_torch_does(arm, dtype):
    """Against float64, no worse than the same operations written out in torch."""
    plain = {
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "glu": torch.sigmoid,
        "bilinear": lambda gate: gate,
        "reglu": torch.relu,
        "geglu": torch.nn.functional.gelu,
        "swiglu": torch.nn.functional.silu,
    }[arm]
    pre = pre_activations(arm, dtype, rows=64)
    written_out = plain(pre[:, 0]) * pre[:, 1] if pre.ndim == 3 else plain(pre)
    exact = by_hand(arm, pre)
    error = (compute(arm, pre).double() - exact).norm()
    assert error <= 1.1 * (written_out.double() - exact).norm()


def test_a_number_is_not_rounded_to_the_dtype_of_the_pre_activations():
    """1.702 in bf16 is 1.703: the slope would be another one."""
    pre = torch.linspace(1, 2, 129).bfloat16()
    expected = (1.702 * pre.float()).bfloat16()
    assert torch.equal(activation("1.702 * x")(pre), expected)
    assert torch.equal(activation("x * 1.702")(pre), expected)
    assert not torch.equal(torch.tensor(1.702, dtype=torch.bfloat16) * pre, expected)


def test_a_choice_between_numbers_neither_rounds_them_nor_computes_in_float64():
    class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, Tensor) and out.ndim and out.dtype == torch.float64), function
            return out

    pre = -torch.linspace(1, 2, 129).bfloat16()
    with Dtypes():
        h = activation("where(x > 0, 1, 0.01) * x")(pre)
    assert torch.equal(h, (0.01 * pre.float()).bfloat16())


def test_learned_parameters_broadcast_and_get_gradients():
    prelu = activation("where(x > 0, x, slope * x)", parameters={"slope": {"init": 0.25, "share": "channel"}})
    pre = torch.tensor([[-2.0, 3.0], [-4.0, -5.0]], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    h = prelu(pre, slope=slope)
    assert h.tolist() == [[-0.5, 3.0], [-1.0, -2.5]]
    h.sum().backward()
    assert slope.grad.tolist() == [-6.0, -5.0]
    assert pre.grad.tolist() == [[0.25, 1.0], [0.25, 0.5]]
    low = activation("slope * x", parameters={"slope": {"init": 0.25, "share": "channel"}})(
        pre.detach().bfloat16(), slope=slope.detach().float()
    )
    assert low.dtype == torch.bfloat16


def test_formulas_that_differ_in_their_parameters_alone_are_not_mistaken_for_each_other():
    text = "where(x > 0, x, slope * x)"
    for share, size in (("layer", 1), ("channel", 3)):
        slope = torch.full((size,), 0.25, requires_grad=True)
        prelu = activation(text, {"slope": {"init": 0.25, "share": share}})
        prelu(-torch.ones(2, 3), slope=slope).sum().backward()
        assert slope.grad.tolist() == [-6.0 / size] * size


def test_any_number_of_leading_dimensions():
    pre = torch.randn(2, 3, 5, 2, 7, dtype=torch.float64)
    h = activation("silu(gate) * up")(pre)
    assert h.shape == (2, 3, 5, 7)
    # torch's exp of a whole vector and of the last few elements may differ by an ulp, which three roundings follow.
    torch.testing.assert_close(h[1, 2, 4], activation("silu(gate) * up")(pre[1, 2, 4]), rtol=4 * 2.0**-52, atol=0)
    assert activation("relu(x)")(torch.randn(7)).shape == (7,)
    assert activation("relu(x)")(torch.randn(0, 7)).shape == (0, 7)


def test_a_gated_arm_refuses_what_is_no_pair():
    for shape in [(7,), (3, 7), (2, 3, 7), (2, 1, 7)]:
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            activation("gate * up")(torch.randn(shape))


def test_what_is_wrong_is_refused_when_it_is_asked_for():
    with pytest.raises(ValueError, match="unknown kernel backend 'cuda': choose from auto, reference, c, triton"):
        activation("x", backend="cuda")
    with pytest.raises(FormulaError):
        activation("x * slope")
    assert "silu(gate) * up" in repr(activation("silu(gate) * up"))


def test_the_largest_formula_computes():
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(activation("x" + "+x" * 200)(x), 201 * x, rtol=200 * 2.0**-53, atol=0)


@pytest.mark.parametrize("formula", ["silu(x)", "gelu(x)", "softplus(x)", "sigmoid(x)", "tanh(x)", "relu(x)**2"])
def test_extreme_pre_activations_stay_finite(formula):
    pre = torch.tensor([-1e4, -300.0, 300.0, 1e4], requires_grad=True)
    h = activation(formula)(pre)
    h.sum().backward()
    assert h.isfinite().all()
    assert pre.grad.isfinite().all()


OUTPUT_ARMS = [path.stem for path in sorted(FFN.glob("*.yaml")) if "from_output" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("arm", OUTPUT_ARMS)
def test_the_gradient_from_the_output_is_the_gradient(arm):
    stored = yaml.safe_load((FFN / f"{arm}.yaml").read_text(encoding="utf-8"))
    function = activation(stored["formula"], stored.get("parameters"), from_output=stored["from_output"])
    pre = pre_activations(arm)
    dh = torch.randn(pre.shape, dtype=torch.float64)
    expected, _, _ = function.backward(pre, dh, [])
    actual = function.backward_from_output(function.forward(pre, []), dh)
    # 1 - h^2 of an h near 1 keeps the absolute precision of h, not the relative one.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("formula", "from_output", "reason"),
    [
        ("tanh(x)", "1 - h", "is not the derivative of tanh(x): at x = -10 it gives 2"),
        ("gelu(x)", "h", "is not the derivative of gelu(x)"),
        ("tanh(x)", "1 - x", "may use only h and fixed parameters"),
        ("tanh(x)", "1 - k", "unknown symbol 'k'"),
        ("gate * up", "h", "requires an ungated formula that learns nothing"),
    ],
)
def test_a_derivative_of_the_output_that_is_none_is_refused(formula, from_output, reason):
    with pytest.raises(FormulaError, match=re.escape(reason)):
        assert activation(formula, from_output=from_output).compiled


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("share", "shape", "dh", "reason"),
    [
        ("channel", (1,), (3, 8), "the parameter 'b', one per channel, must be (8,) on cpu, not (1,) on cpu"),
        ("channel", (7,), (3, 8), "the parameter 'b', one per channel, must be (8,) on cpu, not (7,) on cpu"),
        ("layer", (8,), (3, 8), "the parameter 'b', one per layer, must be (1,) on cpu, not (8,) on cpu"),
        ("layer", (), (3, 8), "the parameter 'b', one per layer, must be (1,) on cpu, not () on cpu"),
        ("layer", (1,), (3, 7), "the gradient of h is (3, 7) torch.float32 on cpu, and h is (3, 8)"),
    ],
)
def test_what_a_kernel_would_reach_beyond_is_refused(share, shape, dh, reason, backend):
    function = activation("b * x", {"b": {"init": 1.0, "share": share}}, backend)
    with pytest.raises(ValueError, match=re.escape(reason)):
        function.backward(torch.ones(3, 8), torch.ones(dh), [torch.ones(shape)])
    if dh == (3, 8):
        with pytest.raises(ValueError, match=re.escape(reason)):
            function(torch.ones(3, 8), b=torch.ones(shape))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        function.backward(torch.ones(3, 8), torch.ones(3, 8, dtype=torch.float64), [torch.ones(1)])
    with pytest.raises(ValueError, match="but 0 tensors were given"):
        function.forward(torch.ones(3, 8), [])
