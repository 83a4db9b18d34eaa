"""How Hugging Face Transformers represents our decoder: the class for an arm, and the names and shapes of its tensors.

    LlamaForCausalLM     act(gate) * up, for an `act` of `ACTIVATIONS`
    Qwen3ForCausalLM     the same with QK-norm
    ArceeForCausalLM     act(x), for an `act` of `ACTIVATIONS`
    ApertusForCausalLM   the same with QK-norm; the only class that keeps the parameters of xielu in the model's dtype
    FormulaForCausalLM   everything else (`modeling.py`): other formulas, and layers that differ

Gemma's classes fit no arm: they scale the embedding by sqrt(d_model), add 1 to the weights of norms, and later versions
normalise the output of each block. `gelu(gate) * up` is a Llama or Qwen3 with hidden_act "gelu".

An arm is recognised by its parsed formula, never by its name. `model/export.py` and `model/import_hf.py` share this table of
names. This module imports neither torch nor Transformers, and opens no file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from conf.shape import Shape
from kernels.formula import Formula, Node, parse

# model_type in config.json
LLAMA, QWEN3, ARCEE, APERTUS, FORMULA = "llama", "qwen3", "arcee", "apertus", "formula_ffn"
CLASSES = {
    LLAMA: "LlamaForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
    ARCEE: "ArceeForCausalLM",
    APERTUS: "ApertusForCausalLM",
    FORMULA: "FormulaForCausalLM",
}
GATED, WITH_QK_NORM = (LLAMA, QWEN3), (QWEN3, APERTUS)
_NATIVE = {(name in GATED, name in WITH_QK_NORM): name for name in (LLAMA, QWEN3, ARCEE, APERTUS)}


@dataclasses.dataclass(frozen=True)
class NativeActivation:
    """A `hidden_act` of Transformers (see its activations.py) as a formula of x.

    Args:
        formula: of x.
        learned: its parameters, one value per layer, by their name in the formula: (name in `mlp.act_fn`, initial value).
        fixed: its buffers by their name in the formula, which checkpoints hold too.
        absent: buffers that the formula leaves out, with the value at which they have no effect.
        exact_in: the model types that keep the parameters in the dtype of the model. Others round them to bf16: there the
            activation is imported but never exported.
    """

    formula: str
    learned: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    absent: dict[str, float] = dataclasses.field(default_factory=dict)
    exact_in: tuple[str, ...] = (LLAMA, QWEN3, ARCEE, APERTUS)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters for `kernels.formula.parse`."""
        return self.fixed | {name: {"init": init, "share": "layer"} for name, (_, init) in self.learned.items()}


# Huang 2024, arXiv 2411.13010: a learned number starts so that each alpha is 0.8, log(expm1(0.8)) and log(expm1(0.8 - beta)).
_XIELU_LEARNED = {"ap": ("alpha_p", 0.20338), "an": ("alpha_n", -1.05022)}
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
    "xielu": NativeActivation(
        "where(x > 0, softplus(ap) * x**2, (beta + softplus(an)) * (expm1(min(x, eps)) - x)) + beta * x",
        _XIELU_LEARNED,
        fixed={"beta": 0.5, "eps": -1e-6},
        exact_in=(APERTUS,),
    ),
    "swish": NativeActivation("silu(x)"),
    "gelu_python": NativeActivation("gelu(x)"),
    "gelu_new": NativeActivation("gelu_tanh(x)"),
    "gelu_fast": NativeActivation("gelu_tanh(x)"),
    "gelu_accurate": NativeActivation("gelu_tanh(x)"),
    "gelu_python_tanh": NativeActivation("gelu_tanh(x)"),
}
_VARIANTS = {  # further formulas of a `hidden_act`, for other values of its buffers
    "xielu": NativeActivation(
        "where(x > 0, softplus(ap) * x**2, (beta + softplus(an)) * (expm1(x) - x)) + beta * x",
        _XIELU_LEARNED,
        fixed={"beta": 0.5},
        absent={"eps": 0.0},
        exact_in=(APERTUS,),
    )
}


def variants(hidden_act: str) -> list[NativeActivation]:
    """Return the formulas of a `hidden_act`, of which the first is that of its default buffers."""
    return [ACTIVATIONS[hidden_act], *([_VARIANTS[hidden_act]] if hidden_act in _VARIANTS else [])]


@dataclasses.dataclass(frozen=True)
class TransformersLayout:
    """The representation of a decoder in Transformers.

    Args:
        model_type: in config.json.
        hidden_act: in config.json, for all but formula_ffn.
        learned: {a formula's learned parameter: its tensor in `mlp.act_fn`}.
        buffers: {name of a further tensor in `mlp.act_fn`: its value}.
    """

    model_type: str
    hidden_act: str = ""
    learned: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: dict[str, float] = dataclasses.field(default_factory=dict)


def transformers_layout(shape: Shape) -> TransformersLayout:
    """Return how Transformers represents a decoder of this shape: by a native class if one computes the same function."""
    first = shape.ffn[0]
    model_type = _NATIVE[first.formula.gated, shape.qk_norm]
    activations = [recognise(ffn.formula, model_type) for ffn in shape.ffn]
    alike = all(each == activations[0] for each in activations) and len({ffn.d_ff for ffn in shape.ffn}) == 1
    # Llama and Arcee refuse a d_model that n_heads does not divide, even if head_dim is given.
    fits = shape.qk_norm or shape.d_model % shape.n_heads == 0
    if activations[0] is None or not alike or not fits or shape.logit_softcap:
        return TransformersLayout(FORMULA)
    hidden_act, native, learned = activations[0]
    stored = {ours: native.learned[theirs][0] for ours, theirs in learned.items()}
    return TransformersLayout(model_type, hidden_act, stored, native.fixed | native.absent)


def recognise(formula: Formula, model_type: str) -> tuple[str, NativeActivation, dict[str, str]] | None:
    """Return the `hidden_act` that computes a formula in a native class, or None.

    Returns:
        The name, the activation, and {the formula's learned parameter: that of the activation}.
    """
    if any(parameter.share != "layer" for parameter in formula.learned.values()):
        return None
    for hidden_act in ACTIVATIONS:
        for native in variants(hidden_act):
            learned = _match(formula, native) if model_type in native.exact_in else None
            if learned is not None:
                return hidden_act, native, learned
    return None


def _match(formula: Formula, native: NativeActivation) -> dict[str, str] | None:
    """Return {the formula's learned parameter: that of `native`} if both compute the same function."""
    if len(native.learned) != len(formula.learned):
        return None
    pattern = canonical(parse(native.formula, native.parameters).tree, native.fixed)
    for order in itertools.permutations(native.learned):
        learned = dict(zip(formula.learned, order, strict=True))
        if _activation(formula, learned) == pattern:
            return learned
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

    Formulas that differ in the order of terms, by `x**2 = x*x`, by a term that both branches of a `where` add, or by the
    definitions of silu and relu have the same form.

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
        return (node.kind, node.value, *inside) if node.kind == "reduce" else (node.kind, *inside)
    if node.value == "silu":
        return _product([inside[0], ("sigmoid", inside[0])])
    if node.value == "relu":
        return ("max", *sorted([inside[0], ("number", 0.0)], key=repr))
    if node.value in ("max", "min"):
        return (str(node.value), *sorted(inside, key=repr))
    if node.value == "where":
        return _where(*inside)
    return (str(node.value), *inside)


def _where(condition: tuple, left: tuple, right: tuple) -> tuple:
    """Return the form of a `where`, with the terms that both branches add outside of it."""
    terms = [list(branch[1:]) if branch[0] == "+" else [branch] for branch in (left, right)]
    shared = []
    for term in list(terms[0]):
        if term in terms[1]:  # once for each time that both have it
            shared.append(term)
            for branch in terms:
                branch.remove(term)
    return _sum([("where", condition, *map(_sum, terms)), *shared]) if left != right else left


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
        return [(f"{prefix}.mlp.{theirs}", (ffn.formula.learned[ours].size(ffn.d_ff),))]
    halves = ("gate", "up") if ffn.matrices == 3 else ("up",)
    norm = "{}_proj.norm" if layout.model_type == FORMULA else "{}_norm"
    apertus = ("attention_layernorm", "feedforward_layernorm")
    before = apertus if layout.model_type == APERTUS else ("input_layernorm", "post_attention_layernorm")
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "attention.qkv": [
            (f"self_attn.{each}_proj.weight", (rows, shape.d_model))
            for each, rows in (("q", queries), ("k", keys), ("v", keys))
        ],
        "attention.out": [("self_attn.o_proj.weight", (shape.d_model, queries))],
        "attention.q_norm.weight": [(f"self_attn.{norm.format('q')}.weight", (shape.head_dim,))],
        "attention.k_norm.weight": [(f"self_attn.{norm.format('k')}.weight", (shape.head_dim,))],
        "attention_norm.weight": [(f"{before[0]}.weight", (shape.d_model,))],
        "ffn_norm.weight": [(f"{before[1]}.weight", (shape.d_model,))],
        "ffn.up": [(f"mlp.{each}_proj.weight", (ffn.d_ff, shape.d_model)) for each in halves],
        "ffn.down": [("mlp.down_proj.weight", (shape.d_model, ffn.d_ff))],
    }
    return [(f"{prefix}.{each}", size) for each, size in parts[part]]
