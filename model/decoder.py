"""A LLaMA-style decoder, written once.

Notable in it:
- pre-norm RMSNorm, rotary positions, grouped-query attention, no biases; optional QK-norm, tied or untied head
- q, k and v are one matrix, gate and up are one parameter (2, d_ff, d_model): one GEMM each
- the residual stream is passed on beside what is to be added to it: the next norm adds and normalises in one pass
- the feed-forward arm of each layer is a formula (`feed_forward.py`): no branch on its name stands anywhere
- the training loss comes out of `Head`, fused with the output projection: the full logits never exist
- weights come from `initialise.py`, how training is partitioned over ranks is `training/`'s affair

Shapes: B batch, S sequence, D d_model, H heads, K key/value heads, E head_dim, F d_ff, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from model.accounting import Shape
from model.attention import attend, attend_cached
from model.feed_forward import FeedForward
from model.layers import RMSNorm, Rotary
from model.loss import linear_cross_entropy

# For each layer, the keys and values so far: two tensors (B, T, K, E). Empty before the first token.
Cache = list[tuple[Tensor, Tensor] | None]


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, shape: Shape, config: ModelConfig, rotary: Rotary, backend: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
        self.rotary, self.backend = rotary, backend
        rows = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        self.qkv = nn.Parameter(torch.empty(rows, shape.d_model))  # rows of q, then of k, then of v
        self.out = nn.Parameter(torch.empty(shape.d_model, shape.n_heads * shape.head_dim))
        self.q_norm = RMSNorm(shape.head_dim, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, config.norm_eps) if shape.qk_norm else None

    def forward(self, x: Tensor, documents: Tensor | None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """x (B, S, D) -> (B, S, D). With a cache, x holds the newest tokens only."""
        heads = F.linear(x, self.qkv).unflatten(-1, (-1, self.head_dim))  # B S H+2K E
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        if self.q_norm is not None:
            (q, _), (k, _) = self.q_norm(q), self.k_norm(k)
        start = cache[layer][0].shape[1] if cache and cache[layer] else 0
        q, k = self.rotary(q, k, start)
        if cache is None:
            mixed = attend(q, k, v, self.backend, documents)
        else:
            if cache[layer]:
                k, v = torch.cat((cache[layer][0], k), 1), torch.cat((cache[layer][1], v), 1)
            cache[layer] = k, v
            mixed = attend_cached(q, k, v)
        return F.linear(mixed.flatten(2), self.out)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream.

    What a block computes is added to the stream by the norm that follows, in one pass; so a layer takes and returns both.
    """

    def __init__(self, shape: Shape, index: int, model: ModelConfig, rotary: Rotary, backend: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.d_model, model.norm_eps)
        self.attention = Attention(shape, model, rotary, backend)
        self.ffn_norm = RMSNorm(shape.d_model, model.norm_eps)
        self.ffn = FeedForward(shape.ffn[index].arm, shape.ffn[index].d_ff, shape.d_model)

    def forward(
        self, x: Tensor, stream: Tensor | None, documents: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, D), to be added to the stream (B, S, D), or to begin it -> the next x, and the stream without it."""
        x, stream = self.attention_norm(x, stream)
        x = self.attention(x, documents, cache, layer)
        x, stream = self.ffn_norm(x, stream)
        return self.ffn(x), stream


class Embedding(nn.Module):
    """Tokens (B, S) -> (B, S, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    """The output projection: logits, or straight to the loss."""

    def __init__(self, weight: nn.Parameter, z_loss: float) -> None:
        super().__init__()
        self.weight = weight  # (V, D)
        self.z_loss = z_loss

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, S, D) -> logits (B, S, V); with targets (B, S) -> (what training minimises, mean nats), fp32 scalars."""
        if targets is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, targets, self.z_loss)


class Decoder(nn.Module):
    """The whole model.

    Args:
        shape: the resolved sizes.
        model: its group of the configuration.
        backend: of attention, as `attention.choose` returned it.
        document_start: token that begins a document in packed sequences, or None to let attention cross documents.
    """

    def __init__(self, shape: Shape, model: ModelConfig, backend: str, document_start: int | None = None) -> None:
        super().__init__()
        self.shape, self.document_start = shape, document_start
        self.recompute = model.activation_checkpointing
        rotary = Rotary(shape.head_dim, model.rope_theta)
        self.embedding = Embedding(shape)
        self.layers = nn.ModuleList(Layer(shape, index, model, rotary, backend) for index in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, model.norm_eps)
        own = None if shape.tied else nn.Parameter(torch.empty(shape.vocab_size, shape.d_model))
        self.head = Head(self.embedding.weight if own is None else own, model.z_loss)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, S, V) of tokens (B, S).

        With targets (B, S), where -100 is left out, return two fp32 scalars: the objective (with z-loss, if there is any),
        and the mean cross-entropy in nats, which is not differentiable.

        With a cache (a list of one None a layer at first), `tokens` are the newest only, and the cache grows by them.
        """
        documents = None
        if self.document_start is not None and cache is None:
            documents = (tokens == self.document_start).cumsum(1)
        x, stream = self.embedding(tokens), None
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training and torch.is_grad_enabled():
                x = x if stream is None else x + stream  # one tensor a layer is kept, not two
                x, stream = checkpoint(layer, x, None, documents, use_reentrant=False)
            else:
                x, stream = layer(x, stream, documents, cache, index)
        x, _ = self.norm(x, stream)
        return self.head(x, targets)
