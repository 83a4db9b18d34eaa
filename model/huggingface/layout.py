"""How Hugging Face Transformers represents our decoder: the class for an arm, and the names and shapes of its tensors.

    LlamaForCausalLM     act(gate) * up, for an `act` of `ACTIVATIONS`
    ArceeForCausalLM     act(x), for an `act` of `ACTIVATIONS`
    FormulaForCausalLM   everything else (`modeling.py`): other formulas, layers that differ, QK-norm

An arm is recognised by its parsed formula, never by its name. `model/export.py` and `model/import_hf.py` share this table of
names. This module imports neither torch nor Transformers, and opens no file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from kernels.formula import Formula, Node, parse
from launch.estimate.counts import Shape

LLAMA, ARCEE, FORMULA = "llama", "arcee", "formula_ffn"  # model_type in config.json
CLASSES = {LLAMA: "LlamaForCausalLM", ARCEE: "ArceeForCausalLM", FORMULA: "FormulaForCausalLM"}


@dataclasses.dataclass(frozen=True)
class NativeActivation:
    """A `hidden_act` of Transformers (see its activations.py) as a formula of x.

    Args:
        formula: of x.
        learned: its parameters, one value per layer, by their name in the formula: (name in `mlp.act_fn`, initial value).
        fixed: its buffers by their name in the formula, which checkpoints hold too.
        exact: whether Transformers keeps the parameters in the dtype of the model. If it rounds them, the activation is
            imported but never exported.
    """

    formula: str
    learned: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    exact: bool = True

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters for `kernels.formula.parse`."""
        return self.fixed | {name: {"init": init, "share": "layer"} for name, (_, init) in self.learned.items()}


_XIELU = "where(x > 0, softplus(ap) * x**2 + beta * x, (beta + softplus(an)) * (expm1(min(x, eps)) - x) + beta * x)"
ACTIVATIONS = {  # of several names for one function, export uses the first
    "silu": NativeActivation("silu(x)"),
    "gelu": NativeActivation("gelu(x)"),
    "gelu_pytorch_tanh": NativeActivation("gelu_tanh(x)"),
    "relu": NativeActivation("relu(x)"),
    "relu2": NativeActivation("relu(x) ** 2"),
    "linear": NativeActivation("x"),
    "sigmoid": NativeActivation("sigmoid(x)"),
    "tanh": NativeActivation("tanh(x)"),
    "mish": NativeActivation("x * tanh(softplus(x))"),
    "leaky_relu": NativeActivation("where(x > 0, x, 0.01 * x)"),
    "quick_gelu": NativeActivation("x * sigmoid(1.702 * x)"),
    "relu6": NativeActivation("clip(x, 0, 6)"),
    "hardswish": NativeActivation("x * clip(x + 3, 0, 6) / 6"),
    "gelu_10": NativeActivation("clip(gelu(x), -10, 10)"),
    "prelu": NativeActivation("where(x > 0, x, slope * x)", {"slope": ("weight", 0.25)}),
    # Transformers keeps these parameters in bf16. They start at log(expm1(0.8)) and log(expm1(0.3)), because a constant 0.5 is
    # added to softplus(an), which the arm xielu does not do.
    "xielu": NativeActivation(
        _XIELU,
        {"ap": ("alpha_p", 0.20343), "an": ("alpha_n", -1.05022)},
        fixed={"beta": 0.5, "eps": -1e-6},
        exact=False,
    ),
    "swish": NativeActivation("silu(x)"),
    "gelu_python": NativeActivation("gelu(x)"),
    "gelu_new": NativeActivation("gelu_tanh(x)"),
    "gelu_fast": NativeActivation("gelu_tanh(x)"),
    "gelu_accurate": NativeActivation("gelu_tanh(x)"),
    "gelu_python_tanh": NativeActivation("gelu_tanh(x)"),
}


@dataclasses.dataclass(frozen=True)
class TransformersLayout:
    """The representation of a decoder in Transformers.

    Args:
        model_type: in config.json.
        hidden_act: in config.json, for llama and arcee.
        learned: {a formula's learned parameter: its tensor in `mlp.act_fn`}.
        buffers: names of further tensors that `mlp.act_fn` may store.
    """

    model_type: str
    hidden_act: str = ""
    learned: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()


def transformers_layout(shape: Shape) -> TransformersLayout:
    """Return how Transformers represents a decoder of this shape: by a native class if one computes the same function."""
    activations = [recognise(ffn.formula) for ffn in shape.ffn]
    alike = all(each == activations[0] for each in activations) and len({ffn.d_ff for ffn in shape.ffn}) == 1
    # The native classes refuse a d_model that n_heads does not divide, even if head_dim is given.
    if activations[0] is None or not alike or shape.qk_norm or shape.d_model % shape.n_heads:
        return TransformersLayout(FORMULA)
    hidden_act, learned = activations[0]
    stored = {ours: ACTIVATIONS[hidden_act].learned[theirs][0] for ours, theirs in learned.items()}
    return TransformersLayout(LLAMA if shape.ffn[0].formula.gated else ARCEE, hidden_act, stored)


def recognise(formula: Formula) -> tuple[str, dict[str, str]] | None:
    """Return the `hidden_act` that a formula computes, and {its learned parameter: that of the `NativeActivation`}; or None."""
    if any(parameter.share != "layer" for parameter in formula.learned.values()):
        return None
    for hidden_act, native in ACTIVATIONS.items():
        if native.exact and len(native.learned) == len(formula.learned):
            pattern = parse(native.formula, native.parameters)
            for names in itertools.permutations(native.learned):
                learned = dict(zip(formula.learned, names, strict=True))
                if _activation(formula, learned) == canonical(pattern.tree, pattern.fixed):
                    return hidden_act, learned
    return None


def _activation(formula: Formula, learned: dict[str, str]) -> tuple | None:
    """Return the canonical form of `act` in `act(x)` or `act(gate) * up`; None if the formula is neither."""
    if not formula.gated:
        return canonical(formula.tree, formula.fixed | learned)
    product = canonical(formula.tree, formula.fixed | learned | {"gate": "x"})
    up = ("symbol", "up")
    if product[0] != "*" or up not in product[1:]:
        return None
    factors = list(product[1:])
    factors.remove(up)
    return None if _mentions(factors, up) else _product(factors)


def canonical(node: Node, names: Mapping[str, float | str] | None = None) -> tuple:
    """Return a canonical form of a formula's tree.

    Formulas that differ in the order of terms, by `x**2 = x*x`, or by the definitions of silu and relu have the same form.

    Args:
        names: numbers or other names to substitute for symbols.
    """
    substitutions = names or {}
    inside = [canonical(argument, substitutions) for argument in node.arguments]
    if node.kind == "number":
        return ("number", float(node.value))
    if node.kind == "symbol":
        value = substitutions.get(str(node.value), node.value)
        return ("symbol", value) if isinstance(value, str) else ("number", float(value))
    if node.kind == "negate":
        return _product([("number", -1.0), *inside])
    if node.kind in ("+", "-"):
        left, right = inside
        return _sum([left, right if node.kind == "+" else _product([("number", -1.0), right])])
    if node.kind == "*":
        return _product(inside)
    if node.kind == "**" and inside[1][0] == "number" and inside[1][1] in (1.0, 2.0, 3.0, 4.0):
        return _product([inside[0]] * int(inside[1][1]))
    if node.kind in ("<", "<="):
        return (node.kind.replace("<", ">"), inside[1], inside[0])
    if node.kind != "call":
        return (node.kind, *inside)
    if node.value == "silu":
        return _product([inside[0], ("sigmoid", inside[0])])
    if node.value == "relu":
        return ("max", *sorted([inside[0], ("number", 0.0)], key=repr))
    if node.value in ("max", "min"):
        return (str(node.value), *sorted(inside, key=repr))
    return (str(node.value), *inside)


def _product(factors: list[tuple]) -> tuple:
    return _collected("*", factors, 1.0)


def _sum(terms: list[tuple]) -> tuple:
    return _collected("+", terms, 0.0)


def _collected(sign: str, parts: list[tuple], neutral: float) -> tuple:
    """Flatten nested sums or products, combine their numbers into one, and sort the rest."""
    flat = [inner for part in parts for inner in (part[1:] if part[0] == sign else (part,))]
    number = neutral
    for part in flat:
        if part[0] == "number":
            number = number * part[1] if sign == "*" else number + part[1]
    rest = sorted((part for part in flat if part[0] != "number"), key=repr)
    if number != neutral or not rest:
        rest.insert(0, ("number", number))
    return rest[0] if len(rest) == 1 else (sign, *rest)


def _mentions(parts: Any, wanted: tuple) -> bool:
    return parts == wanted or (isinstance(parts, (tuple, list)) and any(_mentions(part, wanted) for part in parts))


def tensor_names(name: str, shape: Shape, layout: TransformersLayout) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the tensors that hold one of our parameters: consecutive blocks of its rows.

    Args:
        name: as in `Decoder.named_parameters`.
    """
    ends = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    if name in ends:
        return [(ends[name], (shape.vocab_size, shape.d_model))]
    if name == "norm.weight":
        return [("model.norm.weight", (shape.d_model,))]
    _, index, part = name.split(".", 2)
    prefix, ffn = f"model.layers.{index}", shape.ffn[int(index)]
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    if part.startswith("ffn.learned."):
        ours = part.removeprefix("ffn.learned.")
        theirs = f"act_fn.{layout.learned[ours]}" if ours in layout.learned else f"learned.{ours}"
        return [(f"{prefix}.mlp.{theirs}", (ffn.d_ff if _share(ffn.arm.parameters[ours]) == "channel" else 1,))]
    halves = ("gate", "up") if ffn.matrices == 3 else ("up",)
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "attention.qkv": [
            (f"self_attn.{each}_proj.weight", (rows, shape.d_model))
            for each, rows in (("q", queries), ("k", keys), ("v", keys))
        ],
        "attention.out": [("self_attn.o_proj.weight", (shape.d_model, queries))],
        "attention.q_norm.weight": [("self_attn.q_proj.norm.weight", (shape.head_dim,))],
        "attention.k_norm.weight": [("self_attn.k_proj.norm.weight", (shape.head_dim,))],
        "attention_norm.weight": [("input_layernorm.weight", (shape.d_model,))],
        "ffn_norm.weight": [("post_attention_layernorm.weight", (shape.d_model,))],
        "ffn.up": [(f"mlp.{each}_proj.weight", (ffn.d_ff, shape.d_model)) for each in halves],
        "ffn.down": [("mlp.down_proj.weight", (shape.d_model, ffn.d_ff))],
    }
    return [(f"{prefix}.{each}", size) for each, size in parts[part]]


def _share(parameter: Any) -> str:
    return parameter.get("share", "layer") if isinstance(parameter, Mapping) else ""
