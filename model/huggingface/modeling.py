"""FormulaForCausalLM: a LLaMA decoder whose feed-forward activation is a formula, for Hugging Face Transformers.

This file is copied into an exported folder as `modeling_formula.py` and needs torch and transformers only. Load the folder with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

`config.ffn` lists the layers, each {"formula": "silu(gate) * up", "parameters": {...}, "d_ff": N}. A formula is a function of
`x`, or of `gate` and `up`. A parameter is a fixed number, or {"init": 0.25, "share": "layer" | "channel"}: then it is learned,
and its value is among the weights. With {"share": "group", "groups": 8} each of 8 blocks of channels has a value. Formulas are
read through a whitelist, never by `eval`, and computed in fp32 or wider.

This class is meant for inference. Gradients are autograd's, so if the unused branch of a `where` overflows they are NaN there.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

FUNCTIONS = {
    "abs": torch.abs,
    "sign": torch.sign,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "relu": torch.relu,
    "softplus": lambda x: F.softplus(x, threshold=40.0),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "max": torch.maximum,
    "min": torch.minimum,
    "where": torch.where,
    "clip": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
}


def rms(e: Tensor, epsilon: Tensor | float = 0.0) -> Tensor:
    """Return the root mean square over d_ff, per token."""
    return torch.sqrt(e.square().mean(-1, keepdim=True) + epsilon)


# Over the d_ff channels of a token. `max` and `min` of two arguments are functions.
REDUCTIONS = {
    "mean": lambda e: e.mean(-1, keepdim=True),
    "sum": lambda e: e.sum(-1, keepdim=True),
    "max": lambda e: e.max(-1, keepdim=True).values,
    "min": lambda e: e.min(-1, keepdim=True).values,
    "rms": rms,
    "std": lambda e, epsilon=0.0: torch.sqrt(e.var(-1, correction=0, keepdim=True) + epsilon),
    "norm": lambda e, epsilon=1e-6: e / rms(e, epsilon),
}
OPERATORS = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
    ast.USub: torch.neg,
    ast.UAdd: lambda x: x,
    ast.Lt: torch.lt,
    ast.LtE: torch.le,
    ast.Gt: torch.gt,
    ast.GtE: torch.ge,
}
TOKEN = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|([A-Za-z_]\w*)")


def parse(text: str) -> ast.expr:
    """Return the syntax tree of a formula. Every name gets an underscore in front, so that none is a keyword of Python."""
    python = TOKEN.sub(lambda token: repr(float(token[1])) if token[1] else "_" + token[2], text)
    return ast.parse(f"({python})", mode="eval").body


def evaluate(tree: ast.expr, values: dict[str, Tensor]) -> Tensor:
    """Return the value of a formula.

    Args:
        values: its pre-activations and parameters by name, all of one dtype.

    Raises:
        ValueError: the tree contains something that formulas do not have.
    """
    like = next(iter(values.values()))

    def value(node: ast.expr) -> Tensor:
        if isinstance(node, ast.Constant) and type(node.value) is float:
            return torch.tensor(node.value, dtype=like.dtype, device=like.device)
        if isinstance(node, ast.Name) and node.id[1:] in values:
            return values[node.id[1:]]
        if isinstance(node, ast.Name) and node.id == "_pi":
            return torch.tensor(math.pi, dtype=like.dtype, device=like.device)
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
            return OPERATORS[type(node.ops[0])](value(node.left), value(node.comparators[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            name, arguments = node.func.id[1:], [value(argument) for argument in node.args]
            reduces = name in REDUCTIONS and (name not in FUNCTIONS or len(arguments) == 1)
            if reduces or name in FUNCTIONS:
                return (REDUCTIONS if reduces else FUNCTIONS)[name](*arguments)
        raise ValueError(f"not allowed in a formula: {ast.unparse(node)}")

    return value(tree)


class FormulaConfig(PretrainedConfig):
    """A LlamaConfig with more: `ffn`, the list of feed-forward layers; `qk_norm`, RMSNorm on each head's queries and keys; and
    `final_logit_softcapping`, c of the logits' c tanh(logits / c).
    """

    model_type = "formula_ffn"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        ffn: list[dict[str, Any]] | None = None,
        qk_norm: bool = False,
        final_logit_softcapping: float | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.ffn = (
            ffn or [{"formula": "silu(gate) * up", "parameters": {}, "d_ff": 4 * hidden_size}] * num_hidden_layers
        )
        self.qk_norm, self.final_logit_softcapping = qk_norm, final_logit_softcapping
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.rms_norm_eps, self.rope_theta, self.use_cache = rms_norm_eps, rope_theta, use_cache
        # Llama's constructor reads these; FormulaForCausalLM then replaces some of the layers that it made.
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.attention_bias, self.attention_dropout, self.mlp_bias, self.pretraining_tp = False, 0.0, False, 1
        self.intermediate_size, self.hidden_act = max(layer["d_ff"] for layer in self.ffn), "linear"
        kwargs = {name: value for name, value in kwargs.items() if name not in vars(self)}
        super().__init__(**{**kwargs, "tie_word_embeddings": tie_word_embeddings})


class FormulaMLP(nn.Module):
    """The feed-forward layer: up projection (and gate projection if gated), the formula, down projection."""

    def __init__(self, d_model: int, formula: str, parameters: dict[str, Any], d_ff: int) -> None:
        super().__init__()
        self.tree = parse(formula)
        self.gated = not any(isinstance(node, ast.Name) and node.id == "_x" for node in ast.walk(self.tree))
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False) if self.gated else None
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.fixed = {name: float(given) for name, given in parameters.items() if not isinstance(given, dict)}
        learned = {name: given for name, given in parameters.items() if isinstance(given, dict)}
        self.init = {name: float(given["init"]) for name, given in learned.items()}
        sizes = {"layer": lambda _: 1, "channel": lambda _: d_ff, "group": lambda given: given["groups"]}
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(torch.full((sizes[given.get("share", "layer")](given),), self.init[name]))
                for name, given in learned.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., d_model) -> (..., d_model)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        up = self.up_proj(x).to(wide)
        values = {"x": up} if self.gate_proj is None else {"gate": self.gate_proj(x).to(wide), "up": up}
        values |= {name: torch.tensor(number, dtype=wide, device=x.device) for name, number in self.fixed.items()}
        for name, parameter in self.learned.items():  # (1,), or repeated for the channels of each value
            repeats = up.shape[-1] // len(parameter) if len(parameter) > 1 else 1
            values[name] = parameter.to(wide).repeat_interleave(repeats)
        h = evaluate(self.tree, values)
        return self.down_proj(h.to(x.dtype).expand(up.shape))


class HeadNormedLinear(nn.Linear):
    """A projection to heads, followed by RMSNorm on each head."""

    def __init__(self, d_model: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__(d_model, heads * head_dim, bias=False)
        self.head_dim = head_dim
        self.norm = LlamaRMSNorm(head_dim, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Project and normalise: (..., d_model) -> (..., heads * head_dim)."""
        return self.norm(super().forward(input).unflatten(-1, (-1, self.head_dim))).flatten(-2)


class CappedLinear(nn.Linear):
    """The output projection with a soft cap: c tanh(logits / c)."""

    def __init__(self, d_model: int, vocabulary: int, cap: float) -> None:
        super().__init__(d_model, vocabulary, bias=False)
        self.cap = cap

    def forward(self, input: Tensor) -> Tensor:
        """Project to logits: (..., d_model) -> (..., vocabulary)."""
        return self.cap * torch.tanh(super().forward(input) / self.cap)


class FormulaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with the feed-forward layers of `config.ffn`, and QK-norm and a soft cap if `config` has them."""

    config_class = FormulaConfig
    config: FormulaConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # it has what Llama reads of LlamaConfig

    def __init__(self, config: FormulaConfig) -> None:
        super().__init__(config)  # pyright: ignore[reportArgumentType]  # as above
        for layer, arm in zip(self.model.layers, config.ffn, strict=True):
            layer.mlp = FormulaMLP(config.hidden_size, arm["formula"], arm.get("parameters") or {}, arm["d_ff"])
            if config.qk_norm:
                for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                    normed = HeadNormedLinear(config.hidden_size, heads, config.head_dim, config.rms_norm_eps)
                    setattr(layer.self_attn, name, normed)
        if config.final_logit_softcapping:
            self.lm_head = CappedLinear(config.hidden_size, config.vocab_size, config.final_logit_softcapping)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FormulaMLP):
            for name, parameter in module.learned.items():
                nn.init.constant_(parameter, module.init[name])
