"""What a feed-forward layer of Transformers is: the names of its projections, and its activation as a formula.

What a layer computes is never taken from a name alone. A twin of it in float64, with the layer's own code and small random
weights, must give what the formula gives, in training mode and in evaluation mode.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activation
from ..activations.activation import Activation
from ..mlp import run_mlp

LEARNED = "formula_parameters"  # the name of a given formula's learned parameters in a layer


class PatchError(ValueError):
    """A model has a feed-forward layer that `patch` does not know, or none that it knows."""


class Layout(NamedTuple):
    """The names of a layer's projections; `gate` is empty where there is none, or where `up` computes both."""

    gate: str
    up: str
    down: str
    gated: bool

    def projections(self, module: nn.Module) -> tuple[nn.Module | None, nn.Module, nn.Module]:
        children = module._modules
        gate, up, down = children.get(self.gate), children[self.up], children[self.down]
        assert up is not None
        assert down is not None
        return gate, up, down


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj", True),  # Llama, Mistral, Qwen, Gemma, OLMo
    Layout("", "gate_up_proj", "down_proj", True),  # Phi-3, GLM-4
    Layout("w1", "w3", "w2", True),  # Mixtral's experts, where each is a module
    Layout("", "up_proj", "down_proj", False),  # Arcee, Apertus, Nemotron
    Layout("", "c_fc", "c_proj", False),  # StarCoder2
    Layout("", "fc1", "fc2", False),  # Phi, CLIP
    Layout("", "dense_h_to_4h", "dense_4h_to_h", False),  # GPT-NeoX
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "activation_func", "activation_function")


class Source(NamedTuple):
    """An activation, and where in a layer its learned parameters are."""

    function: Activation
    module: str  # the child that holds them, or is the layer's own activation; empty if there is none
    names: tuple[str, ...]  # in the formula's order

    def learned(self, layer: nn.Module) -> list[Tensor]:
        holder = layer._modules[self.module] if self.names else None
        return [getattr(holder, name) for name in self.names]


# ---------------------------------------------------------------------------------------------------------- what a layer is


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a feed-forward layer by the names of its children; None if they are of no known layer."""
    children = module._modules
    for layout in LAYOUTS:
        if all(isinstance(children.get(name), nn.Module) for name in (layout.gate, layout.up, layout.down) if name):
            return layout
    return None


def check_unknown(module: nn.Module) -> None:
    """Refuse what looks like a feed-forward layer and has no known layout."""
    wide = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3]
    if any(name in ("gate_up_proj", "up_proj", "down_proj", "w1", "w2") for name in wide):
        raise PatchError(f"its experts are one tensor ({', '.join(wide)}), and each sees other tokens")
    if re.search(r"(MLP|FFN|FeedForward)$", type(module).__name__) and not any(map(layout_of, module.modules())):
        children = ", ".join(module._modules) or "none"
        raise PatchError(f"its projections have names that are not known (children: {children})")


def own_activation(module: nn.Module, layout: Layout, backend: str) -> Source:
    """Return the activation of a layer as a formula.

    Raises:
        PatchError: it is not known.
    """
    name = next((name for name in ACTIVATIONS if callable(getattr(module, name, None))), None)
    if name is None:
        raise PatchError("it has no activation under a known name")
    _check_has_values(name, getattr(module, name))
    known = formula_of(getattr(module, name))
    if known is None:
        raise PatchError(f"its activation, {_named(getattr(module, name))}, is not known as a formula")
    text, fixed, learned = known
    text = f"{text.replace('X', 'gate')} * up" if layout.gated else text.replace("X", "x")
    function = _activation(text, tuple(fixed.items()), tuple(learned), backend)
    return Source(function, name if name in module._modules else "", tuple(learned.values()))


@functools.lru_cache(maxsize=64)  # layers of one kind share one
def _activation(text: str, fixed: tuple[tuple[str, float], ...], learned: tuple[str, ...], backend: str) -> Activation:
    # The layer holds the learned parameters, so their initial values do not matter.
    return activation(text, {**dict(fixed), **{name: {"init": 0.5} for name in learned}}, backend)


# Formula of X, its fixed parameters, and by learned parameter the attribute that holds it.
Known = tuple[str, dict[str, float], dict[str, str]]


def formula_of(function: Any) -> Known | None:
    """Return an activation as a formula; None if it is not known."""
    if isinstance(function, functools.partial) and function.func is F.gelu:
        return ("gelu(X)" if function.keywords.get("approximate", "none") == "none" else "gelu_tanh(X)"), {}, {}
    if not isinstance(function, nn.Module):
        text = next((text for known, text in _FUNCTIONS.items() if known is function), None)
        return None if text is None else (text, {}, {})
    return _formula_of_module(function, type(function).__name__)


def _formula_of_module(function: Any, kind: str) -> Known | None:
    if kind == "GELU":
        return ("gelu(X)" if function.approximate == "none" else "gelu_tanh(X)"), {}, {}
    if kind == "LeakyReLU":
        return "where(X > 0, X, slope * X)", {"slope": function.negative_slope}, {}
    if kind == "ClippedGELUActivation":
        return "clip(gelu(X), low, high)", {"low": function.min, "high": function.max}, {}
    if kind == "PReLU" and function.num_parameters == 1:
        return "where(X > 0, X, slope * X)", {}, {"slope": "weight"}
    if kind == "XIELUActivation":
        return (
            _XIELU,
            {name: float(getattr(function, name)) for name in ("beta", "eps")},
            {"ap": "alpha_p", "an": "alpha_n"},
        )
    return None if kind not in _CLASSES else (_CLASSES[kind], {}, {})


# Formulas of X, by the name of the class; what a class of this name computes is checked all the same.
_GELU_TANH = "gelu_tanh(X)"
_CLASSES = {
    "SiLU": "silu(X)",
    "SiLUActivation": "silu(X)",
    "GELUActivation": "gelu(X)",
    "GELUTanh": _GELU_TANH,
    "PytorchGELUTanh": _GELU_TANH,
    "NewGELUActivation": _GELU_TANH,
    "FastGELUActivation": _GELU_TANH,
    "AccurateGELUActivation": _GELU_TANH,
    "QuickGELUActivation": "X * sigmoid(1.702 * X)",
    "ReLU": "relu(X)",
    "ReLU6": "clip(X, 0, 6)",
    "ReLUSquaredActivation": "relu(X)**2",
    "Mish": "X * tanh(softplus(X))",
    "MishActivation": "X * tanh(softplus(X))",
    "Hardswish": "X * clip(X + 3, 0, 6) / 6",
    "LaplaceActivation": "0.5 * (1 + erf((X - 0.707107) / (0.282095 * sqrt(2))))",
    "Sigmoid": "sigmoid(X)",
    "Tanh": "tanh(X)",
    "Identity": "X",
    "LinearActivation": "X",
}
_FUNCTIONS = {
    F.silu: "silu(X)",
    F.gelu: "gelu(X)",
    F.relu: "relu(X)",
    F.mish: "X * tanh(softplus(X))",
    F.sigmoid: "sigmoid(X)",
    F.tanh: "tanh(X)",
    torch.relu: "relu(X)",
    torch.sigmoid: "sigmoid(X)",
    torch.tanh: "tanh(X)",
}
# Huang 2024, arXiv 2411.13010. Between eps, -1e-6, and 0 the slope is another: that of the code in Transformers.
_XIELU = "where(X > 0, softplus(ap) * X**2, (beta + softplus(an)) * (expm1(min(X, eps)) - X)) + beta * X"


def replaced(module: nn.Module, layout: Layout, function: Activation) -> Source:
    """Return a given activation for a layer.

    Raises:
        PatchError: the layer is gated and the formula is not, or the other way round.
    """
    formula = function.formula
    if formula.gated != layout.gated:
        kind, symbols = ("gated", "gate and up") if layout.gated else ("not gated", "x")
        raise PatchError(f"it is {kind}, so a formula for it is of {symbols}, not {formula.text!r}")
    if formula.scheduled:
        names = ", ".join(map(repr, formula.scheduled))
        raise PatchError(f"the values of {names} follow the steps of a training, which a patched layer does not know")
    if any(parameter.share != "layer" for parameter in formula.learned.values()):
        width = hidden_width(module, layout)
        for name, parameter in formula.learned.items():
            if parameter.share == "group" and width % parameter.groups:
                raise PatchError(f"the {parameter.groups} groups of {name!r} do not divide its {width} hidden channels")
    return Source(function, LEARNED if formula.learned else "", tuple(formula.learned))


def hidden_width(module: nn.Module, layout: Layout) -> int:
    width = getattr(layout.projections(module)[1], "out_features", None)
    if not isinstance(width, int):
        raise PatchError(f"{layout.up} has no out_features, so the width of a parameter per channel is not known")
    return width // 2 if layout.gated and not layout.gate else width


# ------------------------------------------------------------------------------------------------------------------- checks


def check_twin(module: nn.Module, layout: Layout, source: Source) -> None:
    """Run the layer's own code with small weights in float64, beside the formula.

    Raises:
        PatchError: it computes something else.
    """
    if getattr(getattr(module, "config", None), "pretraining_tp", 1) > 1:
        raise PatchError("config.pretraining_tp > 1 slices its products")
    twin = _twin(module, layout)
    for name, value in _dropouts(module):
        if value:
            raise PatchError(f"it has dropout ({name} = {value:g})")
    x = torch.randn(64, _TWIN_D, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        expected = run_mlp(source.function, x, *layout.projections(twin), source.learned(twin))
        for training in (True, False):
            twin.train(training)
            try:
                y = type(module).forward(twin, x)
            except Exception as error:
                raise PatchError(
                    f"its forward does not run with other sizes ({type(error).__name__}: {error})"
                ) from error
            if not isinstance(y, Tensor) or y.shape != expected.shape:
                raise PatchError("its forward does not return one tensor like x")
            if training and not torch.equal(y, type(module).forward(twin, x)):
                raise PatchError("its forward is not the same twice: something in it is random")
            if not torch.allclose(y, expected, rtol=0, atol=1e-9 + 1e-8 * float(expected.abs().max())):
                raise PatchError(f"its forward differs from {source.function.formula.text!r}")


_TWIN_D, _TWIN_F = 8, 16


def _twin(module: nn.Module, layout: Layout) -> nn.Module:
    """Return a layer with the code and the settings of `module`, and small random float64 weights on the CPU."""
    generator = torch.Generator().manual_seed(0)
    twin = object.__new__(type(module))  # a class that was made by sharding does not allow a copy
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if name in (layout.gate, layout.up, layout.down):
            width = 2 * _TWIN_F if layout.gated and not layout.gate else _TWIN_F
            sizes = (_TWIN_F, _TWIN_D) if name == layout.down else (_TWIN_D, width)
            bias = getattr(child, "bias", None) is not None
            children[name] = nn.Linear(*sizes, bias=bias, device="cpu", dtype=torch.float64)
        elif child is not None and any(map(_has_weights, child.modules())):
            raise PatchError(f"it has a child that a feed-forward layer does not have ({name}: {type(child).__name__})")
        else:
            children[name] = None if child is None else copy.deepcopy(child).to("cpu", torch.float64)
    children.pop(LEARNED, None)
    twin.__dict__["_modules"] = children
    for parameter in (p for child in layout.projections(twin) if child is not None for p in child.parameters()):
        nn.init.normal_(parameter, generator=generator)
    return twin


def _check_has_values(name: str, child: Any) -> None:
    if isinstance(child, nn.Module) and any(tensor.is_meta for tensor in (*child.parameters(), *child.buffers())):
        raise PatchError(f"its {name} is on the meta device: patch the model once it has weights")


def _has_weights(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())


def _dropouts(module: nn.Module) -> list[tuple[str, float]]:
    """Return the dropout probabilities of a layer by the names that they have there."""
    own = [(name, value) for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return own + [(name, child.p) for name, child in module.named_modules() if isinstance(child, nn.Dropout)]


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
