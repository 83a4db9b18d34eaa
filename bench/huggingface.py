"""A model's shape as settings of Transformers' configurations, for comparisons of speed and of results."""

from __future__ import annotations

from typing import Any

from conf.shape import Shape


def widths(shape: Shape) -> dict[str, Any]:
    """Return the arguments of LlamaConfig, ArceeConfig or Qwen3Config for a model of this shape."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.ffn[0].d_ff,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
