"""Parameters, FLOPs and bytes of a configuration, without torch: what the summary prints and what estimates build on.

Conventions: a multiply-add is two FLOPs; backward costs twice forward; the token embedding is a look-up and costs none.
Attention is counted causal, as in PaLM (arXiv 2204.02311, appendix B) but with half of its square, since no backend here
computes the masked half on purpose. MFU is then FLOPs a token x tokens/s / peak FLOP/s.
"""

from __future__ import annotations

import dataclasses

from conf.arms import layer_arms
from conf.schema import Config, FFNConfig
from kernels.formula import Formula, parse

VOCABULARY_MULTIPLE = 64  # rows of the embedding: GEMM tiles, and later vocabulary-parallel slices, divide it


@dataclasses.dataclass(frozen=True)
class FFNShape:
    """One feed-forward layer with every choice resolved."""

    arm: FFNConfig
    d_ff: int
    matrices: int  # 3 for a gated arm, 2 for an ungated one
    learned: int  # numbers that the formula learns

    def parameters(self, d_model: int) -> int:
        """Return the parameters of the layer."""
        return self.matrices * d_model * self.d_ff + self.learned


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder with every choice resolved."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: tuple[FFNShape, ...]  # of every layer
    vocab_size: int  # rows of the embedding, the tokenizer's rounded up
    tied: bool
    qk_norm: bool


def shape_of(config: Config, tokenizer_size: int | None = None) -> Shape:
    """Resolve the decoder's shape.

    Args:
        config: the run's configuration.
        tokenizer_size: pieces of the tokenizer; None before it exists, then `tokenizer.vocab_size` stands for it.
    """
    model = config.model
    pieces = config.tokenizer.vocab_size if tokenizer_size is None else tokenizer_size
    return Shape(
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        head_dim=model.head_dim or model.d_model // model.n_heads,
        ffn=tuple(_ffn_shape(arm, config) for arm in layer_arms(config)),
        vocab_size=model.vocab_size or -(-pieces // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        tied=model.tie_embeddings,
        qk_norm=model.qk_norm,
    )


def _ffn_shape(arm: FFNConfig, config: Config) -> FFNShape:
    formula = parse(arm.formula, arm.parameters)
    width = config.model.d_ff or default_d_ff(config.model.d_ff_gated, formula)
    learned = sum(width if p.share == "channel" else 1 for p in formula.learned.values())
    return FFNShape(arm, width, formula.matrices, learned)


def default_d_ff(d_ff_gated: int, formula: Formula) -> int:
    """Return the width that gives an arm the FFN parameters of a gated one: 3/2 of it where there are 2 matrices, not 3."""
    return d_ff_gated if formula.gated else d_ff_gated * 3 // 2


def parameters(shape: Shape) -> dict[str, int]:
    """Return the number of parameters by part; the values add up to the whole model."""
    queries, keys_values = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    attention = shape.d_model * (2 * queries + 2 * keys_values)  # in: q, k, v; out: o
    norms = 2 * shape.d_model + (2 * shape.head_dim if shape.qk_norm else 0)
    embedding = shape.vocab_size * shape.d_model
    return {
        "embedding": embedding,
        "attention": shape.n_layers * attention,
        "ffn": sum(layer.parameters(shape.d_model) for layer in shape.ffn),
        "norms": shape.n_layers * norms + shape.d_model,
        "output": 0 if shape.tied else embedding,
    }


def flops_per_token(shape: Shape, sequence_length: int) -> dict[str, int]:
    """Return training FLOPs (forward and backward) a token by part; the values add up to the whole step."""
    by_part = parameters(shape)
    # Scores and their product with the values: 2 x 2 x head_dim x positions seen, on average (length + 1) / 2.
    scores = shape.n_layers * 2 * shape.n_heads * shape.head_dim * (sequence_length + 1)
    forward = {
        "attention": 2 * by_part["attention"] + scores,
        "ffn": sum(2 * layer.matrices * shape.d_model * layer.d_ff for layer in shape.ffn),
        "output": 2 * shape.vocab_size * shape.d_model,
    }
    return {part: 3 * flops for part, flops in forward.items()}
