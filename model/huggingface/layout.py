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
class Native:
    """A `hidden_act` of Transformers (activations.py there) as a formula of x.

    `learned` are its parameters, one a layer, by their name in the formula: (name in `mlp.act_fn`, start). `fixed` are its
    buffers, which stand in a checkpoint too. `exact` is false where Transformers rounds the parameters, whatever the dtype of
    the model: such a one is read, and not written.
    """

    formula: str
    learned: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    exact: bool = True

    @property
    def parameters(self) -> dict[str, Any]:
        """Return what `kernels.formula.parse` takes beside the formula."""
        return self.fixed | {name: {"init": init, "share": "layer"} for name, (_, init) in self.learned.items()}


_XIELU = "where(x > 0, softplus(ap) * x**2 + beta * x, (beta + softplus(an)) * (expm1(min(x, eps)) - x) + beta * x)"
ACTIVATIONS = {  # where two names compute the same, export takes the first
    "silu": Native("silu(x)"),
    "gelu": Native("gelu(x)"),
    "gelu_pytorch_tanh": Native("gelu_tanh(x)"),
    "relu": Native("relu(x)"),
    "relu2": Native("relu(x) ** 2"),
    "linear": Native("x"),
    "sigmoid": Native("sigmoid(x)"),
    "tanh": Native("tanh(x)"),
    "mish": Native("x * tanh(softplus(x))"),
    "leaky_relu": Native("where(x > 0, x, 0.01 * x)"),
    "quick_gelu": Native("x * sigmoid(1.702 * x)"),
    "relu6": Native("clip(x, 0, 6)"),
    "hardswish": Native("x * clip(x + 3, 0, 6) / 6"),
    "gelu_10": Native("clip(gelu(x), -10, 10)"),
    "prelu": Native("where(x > 0, x, slope * x)", {"slope": ("weight", 0.25)}),
    # Its numbers are made in bf16, and stay so. The start is log(expm1(0.8)) and log(expm1(0.3)): a constant 0.5 stands before
    # softplus(an), where the arm xielu has none.
    "xielu": Native(
        _XIELU,
        {"ap": ("alpha_p", 0.20343), "an": ("alpha_n", -1.05022)},
        fixed={"beta": 0.5, "eps": -1e-6},
        exact=False,
    ),
    "swish": Native("silu(x)"),
    "gelu_python": Native("gelu(x)"),
    "gelu_new": Native("gelu_tanh(x)"),
    "gelu_fast": Native("gelu_tanh(x)"),
    "gelu_accurate": Native("gelu_tanh(x)"),
    "gelu_python_tanh": Native("gelu_tanh(x)"),
}


@dataclasses.dataclass(frozen=True)
class TransformersLayout:
    """How a model is held there: its `model_type`, its `hidden_act` (of llama and arcee), and what `act_fn` stores of it.

    `learned` maps a formula's learned parameter to the tensor in `mlp.act_fn`; `buffers` may be stored beside it.
    """

    model_type: str
    hidden_act: str = ""
    learned: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()


def transformers_layout(shape: Shape) -> TransformersLayout:
    """Return the class that holds a decoder of this shape: a native one if it computes the same from the same numbers."""
    found = [recognise(ffn.formula) for ffn in shape.ffn]
    alike = all(one == found[0] for one in found) and len({ffn.d_ff for ffn in shape.ffn}) == 1
    # The native classes refuse a d_model that the heads do not divide, even where head_dim is given.
    if found[0] is None or not alike or shape.qk_norm or shape.d_model % shape.n_heads:
        return TransformersLayout(FORMULA)
    hidden_act, learned = found[0]
    stored = {ours: ACTIVATIONS[hidden_act].learned[theirs][0] for ours, theirs in learned.items()}
    return TransformersLayout(LLAMA if shape.ffn[0].formula.gated else ARCEE, hidden_act, stored)


def recognise(formula: Formula) -> tuple[str, dict[str, str]] | None:
    """Return the `hidden_act` that a formula computes, and {its learned parameter: that of `Native.learned`}; or None."""
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
    """Return the canonical form of `act` in `act(x)`, or in `act(gate) * up`; None if the formula is no such product."""
    if not formula.gated:
        return canonical(formula.tree, formula.fixed | learned)
    whole = canonical(formula.tree, formula.fixed | learned | {"gate": "x"})
    up = ("symbol", "up")
    if whole[0] != "*" or up not in whole[1:]:
        return None
    rest = list(whole[1:])
    rest.remove(up)
    return None if _mentions(rest, up) else _product(rest)


def canonical(node: Node, names: Mapping[str, float | str] | None = None) -> tuple:
    """Return a tree in which what is equal by the order of terms, by `x**2 = x*x`, or by the definition of silu, relu and clip
    is equal. `names` puts numbers, or other names, for symbols."""
    given = names or {}
    inside = [canonical(argument, given) for argument in node.arguments]
    if node.kind == "number":
        return ("number", float(node.value))
    if node.kind == "symbol":
        value = given.get(str(node.value), node.value)
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
    """Flatten, gather the numbers into one, and sort."""
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
    """Return the tensors that one of our parameters is there, with their shapes: blocks of its rows, in this order.

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
