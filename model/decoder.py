"""A LLaMA-style decoder, written once.

Notable in it:
- pre-norm RMSNorm, rotary positions, grouped-query attention, no biases; optional QK-norm, tied or untied head
- q, k and v are one matrix, gate and up are one parameter (2, d_ff, d_model): one GEMM each
- the residual stream is passed on beside what is to be added to it: the next norm adds and normalises in one pass
- the feed-forward arm of each layer is a formula (`feed_forward.py`): no branch on its name stands anywhere
- the training loss comes out of `Head`, fused with the output projection: the full logits never exist
- tensor, sequence and context parallelism lie in the layers (`parallel.py`, `collectives.py`): with one rank each is a plain
layer
- weights come from `initialise.py`; how ZeRO partitions training over ranks is `training/`'s affair

Shapes: B batch, S sequence, D d_model, H heads, K key/value heads, E head_dim, F d_ff, V vocabulary. Of H, K, F and V a
tensor rank has its share, and of S a context rank. With sequence parallelism what is (B, S, D) here is (B S / T, D) between
the matrices: a tensor rank's share of the tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from launch.estimate.counts import Shape
from model.attention import attend, attend_cached
from model.collectives import column_linear, heads_to_sequence, reduced, sequence_to_heads, whole_sequence
from model.feed_forward import FeedForward
from model.layers import RMSNorm, Rotary
from model.loss import gathered_logits, linear_cross_entropy
from model.parallel import Axis, Mesh, cut_parameter


class Cache:
    """For each layer, the keys and values so far: two tensors (B, T, K, E); none before the first token.

    It is no list, because of any list ZeRO-3 hands a module a copy, which would grow instead of this one.
    """

    def __init__(self, n_layers: int) -> None:
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def length(self, layer: int) -> int:
        """Return T."""
        kept = self.layers[layer]
        return 0 if kept is None else kept[0].shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, S, K, E) of the newest tokens, and return all, (B, T + S, K, E)."""
        kept = self.layers[layer]
        if kept is not None:
            k, v = torch.cat((kept[0], k), 1), torch.cat((kept[1], v), 1)
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, shape: Shape, config: ModelConfig, rotary: Rotary, backend: str, mesh: Mesh) -> None:
        super().__init__()
        self.rotary, self.backend, self.head_dim = rotary, backend, shape.head_dim
        self.tensor, self.context = mesh.tensor, mesh.context
        kinds = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)  # rows of q, then of k, then of v
        self.heads = tuple(heads // mesh.tensor.size for heads in kinds)
        rows = [heads * shape.head_dim for heads in kinds]
        self.qkv = cut_parameter(mesh, (sum(rows), shape.d_model), 0, rows)
        self.out = cut_parameter(mesh, (shape.d_model, rows[0]), 1)
        self.q_norm = RMSNorm(shape.head_dim, config.norm_eps, mesh.tensor) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, config.norm_eps, mesh.tensor) if shape.qk_norm else None

    def forward(
        self, x: Tensor, documents: Tensor | None, cache: Cache | None = None, layer: int = 0, batch: int | None = None
    ) -> Tensor:
        """x (B, S, D) -> (B, S, D). With a cache, x holds the newest tokens only.

        Args:
            documents: (B, S of all context ranks), see `attention.attend`.
            batch: B, where x is a share of the tokens.
        """
        sequence = batch is not None
        packed = column_linear(x, self.qkv, self.tensor, sequence)
        heads = packed.view(batch or len(x), -1, sum(self.heads), self.head_dim)  # B S H+2K E
        context = self.context if cache is None else Axis()  # each context rank generates alone
        heads = sequence_to_heads(heads, context, self.heads)
        q, k, v = heads.split([kind // context.size for kind in self.heads], dim=2)
        if self.q_norm is not None:
            (q, _), (k, _) = self.q_norm(q), self.k_norm(k)
        start = cache.length(layer) if cache is not None else 0
        q, k = self.rotary(q, k, start)
        if cache is None:
            mixed = attend(q, k, v, self.backend, documents)
        else:
            mixed = attend_cached(q, *cache.extend(layer, k, v))
        mixed = heads_to_sequence(mixed, context)
        return reduced(F.linear(mixed.flatten(2), self.out), self.tensor, sequence)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream.

    What a block computes is added to the stream by the norm that follows, in one pass; so a layer takes and returns both.
    """

    def __init__(self, shape: Shape, index: int, model: ModelConfig, rotary: Rotary, backend: str, mesh: Mesh) -> None:
        super().__init__()
        shared = mesh.tensor if mesh.sequence else Axis()
        self.attention_norm = RMSNorm(shape.d_model, model.norm_eps, shared)
        self.attention = Attention(shape, model, rotary, backend, mesh)
        self.ffn_norm = RMSNorm(shape.d_model, model.norm_eps, shared)
        self.ffn = FeedForward(shape.ffn[index].arm, shape.ffn[index].d_ff, shape.d_model, mesh)

    def forward(
        self,
        x: Tensor,
        stream: Tensor | None,
        documents: Tensor | None,
        cache: Cache | None = None,
        layer: int = 0,
        batch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, D), to be added to the stream (B, S, D), or to begin it -> the next x, and the stream without it."""
        x, stream = self.attention_norm(x, stream)
        x = self.attention(x, documents, cache, layer, batch)
        x, stream = self.ffn_norm(x, stream)
        return self.ffn(x, batch is not None), stream


class Embedding(nn.Module):
    """Tokens (B, S) -> (B, S, D)."""

    def __init__(self, shape: Shape, mesh: Mesh) -> None:
        super().__init__()
        self.tensor = mesh.tensor
        self.weight = cut_parameter(mesh, (shape.vocab_size, shape.d_model), 0)
        self.first = mesh.tensor.rank * self.weight.shape[0]  # word of this rank's first row

    def forward(self, tokens: Tensor, sequence: bool = False) -> Tensor:
        if self.tensor.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        mine = (tokens >= self.first) & (tokens < self.first + rows)
        found = F.embedding((tokens - self.first).clamp(0, rows - 1), self.weight)
        return reduced(found * mine.unsqueeze(-1), self.tensor, sequence)


class Head(nn.Module):
    """The output projection: logits, or straight to the loss."""

    def __init__(self, weight: nn.Parameter, z_loss: float, mesh: Mesh) -> None:
        super().__init__()
        self.weight = weight  # (V, D)
        self.z_loss, self.tensor = z_loss, mesh.tensor

    def forward(
        self, x: Tensor, targets: Tensor | None = None, sequence: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, S, D) -> logits (B, S, V); with targets (B, S) -> (what training minimises, mean nats), fp32 scalars."""
        if targets is None:
            return gathered_logits(x, self.weight, self.tensor, sequence)
        return linear_cross_entropy(x, self.weight, targets, self.z_loss, tensor=self.tensor, sequence=sequence)


class Decoder(nn.Module):
    """The whole model.

    Args:
        shape: the resolved sizes.
        model: its group of the configuration.
        backend: of attention, as `attention.choose` returned it.
        document_start: token that begins a document in packed sequences, or None to let attention cross documents.
        mesh: the ranks that this model is shared by.
    """

    def __init__(
        self,
        shape: Shape,
        model: ModelConfig,
        backend: str,
        document_start: int | None = None,
        mesh: Mesh = Mesh(),
    ) -> None:
        super().__init__()
        self.shape, self.document_start, self.mesh = shape, document_start, mesh
        self.recompute = model.activation_checkpointing
        rotary = Rotary(shape.head_dim, model.rope_theta)
        self.embedding = Embedding(shape, mesh)
        self.layers = nn.ModuleList(Layer(shape, i, model, rotary, backend, mesh) for i in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, model.norm_eps, mesh.tensor if mesh.sequence else Axis())
        own = None if shape.tied else cut_parameter(mesh, (shape.vocab_size, shape.d_model), 0)
        self.head = Head(self.embedding.weight if own is None else own, model.z_loss, mesh)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, S, V) of tokens (B, S).

        With targets (B, S), where -100 is left out, return two fp32 scalars: the objective (with z-loss, if there is any),
        and the mean cross-entropy in nats, which is not differentiable.

        With a cache, `tokens` are the newest only, and the cache grows by them.

        Of a sequence that context ranks share, each is given its part, and the loss is that of its part; with a cache, and
        among tensor ranks, all are given the same.
        """
        batch = len(tokens) if self.mesh.sequence and cache is None else None
        documents = None
        if self.document_start is not None and cache is None:
            documents = (whole_sequence(tokens, self.mesh.context) == self.document_start).cumsum(1)
        x, stream = self.embedding(tokens, batch is not None), None
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training and torch.is_grad_enabled():
                x = x if stream is None else x + stream  # one tensor a layer is kept, not two
                x, stream = checkpoint(layer, x, None, documents, None, index, batch, use_reentrant=False)
            else:
                x, stream = layer(x, stream, documents, cache, index, batch)
        x, _ = self.norm(x, stream)
        return self.head(x, targets, batch is not None)
