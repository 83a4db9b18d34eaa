"""Names of parameters: those that a layer cannot hold are refused by the parser, and all others work everywhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from kernels import FormulaError, FormulaMLP, activation, parse
from kernels.activations.eager import plain
from model.huggingface.modeling import FormulaMLP as ExportedMLP

ORDINARY = (  # keywords, and what generated code, SymPy and signatures call things
    *(
        "pre",
        "self",
        "h",
        "y",
        "b",
        "weight",
        "bias",
        "name",
        "input",
        "args",
        "lambda",
        "const",
        "restrict",
        "rows",
        "width",
    ),
    *("first", "column", "inside", "reduced", "tl", "fn", "_s0", "E", "I", "oo", "db", "dx", "sum_x", "p_x", "int"),
)


def attributes() -> list[str]:
    """Return the attributes in a process of its own: torch.compile and Transformers add some to all modules."""
    script = "from torch import nn; held = nn.ParameterDict(); print(*sorted({*dir(held), *vars(held)}))"
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()


def test_a_learned_parameter_cannot_be_named_like_an_attribute_of_what_holds_it():
    names = attributes()
    assert {"half", "float", "type", "to", "keys", "training", "forward", "__class__", "_parameters"} <= {*names}
    for name in names:
        text = f"x*(1 + {name})"
        with pytest.raises(FormulaError, match=rf"a learned parameter cannot be named '{re.escape(name)}'") as refusal:
            parse(text, {name: {"init": 1.0}})
        assert text[refusal.value.place :].startswith(name)


@pytest.mark.parametrize("given", [2.0, {"schedule": "linear", "from": 2, "to": 3}], ids=["fixed", "scheduled"])
@pytest.mark.parametrize("name", ["half", "type", "training", "_parameters"])
def test_what_is_not_learned_can_have_such_a_name(name, given):
    mlp = FormulaMLP(4, 8, f"x*{name}", {name: given}).to(torch.float64)
    mlp.set_step(1, 2)
    y = mlp(torch.ones(2, 4, dtype=torch.float64))
    assert y.isfinite().all()


@pytest.mark.parametrize("share", ["layer", "channel"])
def test_every_other_name_works_in_functions_and_layers(share):
    parameters = {name: {"init": 1.0, "share": share} for name in ORDINARY}
    text = f"x*norm(x) + {' + '.join(f'{name}*x' for name in parameters)}"
    pre = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    tensors = {name: torch.rand(8 if share == "channel" else 1, requires_grad=True) for name in parameters}
    function = activation(text, parameters, "c")
    h = function(pre, **tensors)
    gradients = torch.autograd.grad(h.sum(), list(tensors.values()))
    torch.testing.assert_close(h, plain(function.formula)(pre, **tensors))
    expected = pre if share == "channel" else pre.sum()[None]
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected.sum(0) if share == "channel" else expected, atol=1e-5, rtol=1e-5)
    mlp, exported = FormulaMLP(4, 8, text, parameters, backend="c"), ExportedMLP(4, text, parameters, 8)
    exported.load_state_dict(mlp.state_dict())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mlp(x), exported(x))
