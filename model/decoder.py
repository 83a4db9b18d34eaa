"""A LLaMA-style decoder, written once.

Notable in it:
- pre-norm RMSNorm, rotary position embeddings, grouped-query attention, no biases; optional QK-norm, tied or untied head
- q, k and v are one matrix; gate and up are one parameter (2, d_ff, d_model): one GEMM each
- layers pass the residual stream beside the branch output that is to be added to it: the next norm adds and normalises in one
  pass
- the feed-forward arm of each layer is a formula (`feed_forward.py`); no code branches on an arm's name
- the training loss comes out of `Head`, fused with the output projection: the full logits are never materialised
- tensor, sequence and context parallelism are inside the layers (`parallel.py`, `collectives.py`); on a mesh of one rank they
  reduce to plain PyTorch layers

Initial weights live in `initialise.py`; ZeRO and the training loop live in `training/`.

Shapes: B batch, S sequence, D d_model, H heads, K key/value heads, E head_dim, F d_ff, V vocabulary; T tensor ranks, C context
ranks. H, K, F and V are sharded over tensor ranks, and S over context ranks. With sequence parallelism the residual stream is
(B x S / T, D), a tensor rank's shard of the tokens, wherever (B, S, D) is written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from conf.shape import Shape
from launch.estimate.counts import RECOMPUTE_ATTENTION
from model.attention import Documents, attend, attend_cached, largest_logits
from model.collectives import (
    column_parallel_linear,
    gather_sequence,
    heads_to_sequence,
    reduce_output,
    sequence_to_heads,
)
from model.feed_forward import FeedForward
from model.layers import RMSNorm, Rotary
from model.loss import gathered_logits, linear_cross_entropy
from model.parallel import Axis, Mesh, shard_parameter
from model.products import PLAIN, Products

_NO_RANDOMNESS: dict[str, Any] = {"preserve_rng_state": False}  # a layer draws no random numbers


class Cache:
    """The keys and values of every layer so far: two tensors (B, L, K, E) per layer, for L cached tokens.

    This is a class, not a list: ZeRO-3 hands modules copies of lists, and a copy would grow instead of the cache.
    """

    def __init__(self, n_layers: int) -> None:
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def length(self, layer: int) -> int:
        """Return L, the number of cached tokens."""
        cached = self.layers[layer]
        return 0 if cached is None else cached[0].shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, S, K, E) of the newest tokens, and return all, (B, L + S, K, E)."""
        cached = self.layers[layer]
        if cached is not None:
            k, v = torch.cat((cached[0], k), 1), torch.cat((cached[1], v), 1)
        self.layers[layer] = k, v
        return k, v


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """What the layers of one forward pass have in common.

    Args:
        mesh: the model's mesh, or with a cache `Mesh.for_generation` of it.
        batch_size: B, which the shape of a token shard (B x S / T, D) does not show.
        documents: of the sequences, over all context ranks; None: each is one document.
        cache: of keys and values; the pass is given the newest tokens only.
        recompute: what backward computes again, as `model.activation_checkpointing`.
    """

    mesh: Mesh
    batch_size: int
    documents: Documents | None = None
    cache: Cache | None = None
    recompute: bool | str = False


class LayerOptions(NamedTuple):
    """What the layers of a decoder share."""

    model: ModelConfig
    rotary: Rotary
    backend: str
    products: Products


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, shape: Shape, index: int, options: LayerOptions, mesh: Mesh) -> None:
        super().__init__()
        self.index = index  # of the layer, in the cache
        model, self.rotary, self.backend, self.products = options
        self.head_dim = shape.head_dim
        full_counts = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)  # of q, k and v
        rows = [heads * shape.head_dim for heads in full_counts]
        self.head_counts = tuple(heads // mesh.tensor.size for heads in full_counts)  # on this rank
        self.qkv = shard_parameter(mesh, (sum(rows), shape.d_model), 0, rows)
        self.out = shard_parameter(mesh, (shape.d_model, rows[0]), 1)
        self.largest_logits: Tensor | None = None  # if set, (H / TC,): training passes raise it to their largest ones
        self.q_norm = RMSNorm(shape.head_dim, model.norm_eps, mesh.tensor) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, model.norm_eps, mesh.tensor) if shape.qk_norm else None

    def forward(self, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        """Attend: x (B, S, D) -> (B, S, D)."""
        tensor, context, cache = forward_pass.mesh.tensor, forward_pass.mesh.context, forward_pass.cache
        packed = column_parallel_linear(x, self.qkv, tensor, self.products)
        # (B, S / C, (H + 2K) / T, E)
        heads = packed.view(forward_pass.batch_size, -1, sum(self.head_counts), self.head_dim)
        heads = sequence_to_heads(heads, context, self.head_counts)  # (B, S, (H + 2K) / TC, E)
        q, k, v = heads.split([count // context.size for count in self.head_counts], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            (q, _), (k, _) = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, k, 0 if cache is None else cache.length(self.index))
        if self.largest_logits is not None and self.training:
            largest = largest_logits(q, k, forward_pass.documents)
            torch.maximum(self.largest_logits, largest, out=self.largest_logits)
        if cache is None:
            mixed = attend(q, k, v, self.backend, forward_pass.documents)
        else:
            mixed = attend_cached(q, *cache.extend(self.index, k, v))
        mixed = heads_to_sequence(mixed, context)  # (B, S / C, H / T, E)
        return reduce_output(column_parallel_linear(mixed.flatten(2), self.out, Axis(), self.products), tensor)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream.

    A branch's output is added to the stream by the norm that follows, in one pass, so a layer takes and returns both.
    """

    def __init__(self, shape: Shape, index: int, options: LayerOptions, mesh: Mesh) -> None:
        super().__init__()
        gradient_axis, eps = _norm_gradient_axis(mesh), options.model.norm_eps
        self.attention_norm = RMSNorm(shape.d_model, eps, gradient_axis)
        self.attention = Attention(shape, index, options, mesh)
        self.ffn_norm = RMSNorm(shape.d_model, eps, gradient_axis)
        self.ffn = FeedForward(shape.ffn[index], shape.d_model, mesh, options.products)

    def forward(self, x: Tensor, residual: Tensor | None, forward_pass: ForwardPass) -> tuple[Tensor, Tensor]:
        """Apply the layer to the residual stream, whose value is x + residual.

        Args:
            x: (B, S, D), the output of the previous branch.
            residual: (B, S, D), the stream before that branch; None: x is the stream.

        Returns:
            The next x and residual.
        """
        again = forward_pass.recompute in RECOMPUTE_ATTENTION
        x, stream = self.attention_norm(x, residual)
        if again:
            with _dropped(x, self.attention_norm, stream):
                # Recomputing stops short of the output projection's product and of its reduction: nothing needs them again.
                x = cast("Tensor", checkpoint(self.attention, x, forward_pass, use_reentrant=False, **_NO_RANDOMNESS))
        else:
            x = self.attention(x, forward_pass)
        x, stream = self.ffn_norm(x, stream)
        with _dropped(x, self.ffn_norm, stream) if again else nullcontext():
            return self.ffn(x, forward_pass.mesh.tensor), stream


@contextmanager
def _dropped(y: Tensor, norm: RMSNorm, stream: Tensor) -> Iterator[None]:
    """Keep nothing where autograd would keep y = norm(stream) for backward, which computes it again.

    The stream is kept anyway: the norm's own backward needs it.
    """

    storage, shape = y.untyped_storage()._cdata, y.shape  # a reference to y would keep it

    def pack(tensor: Tensor) -> Tensor | None:
        return None if (tensor.untyped_storage()._cdata, tensor.shape) == (storage, shape) else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return norm(stream)[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Embedding(nn.Module):
    """The token embedding, its rows sharded over tensor ranks."""

    def __init__(self, shape: Shape, mesh: Mesh) -> None:
        super().__init__()
        self.weight = shard_parameter(mesh, (shape.vocab_size, shape.d_model), 0)
        self.first_token = mesh.tensor.rank * self.weight.shape[0]  # id of this rank's first row

    def forward(self, tokens: Tensor, tensor: Axis) -> Tensor:
        """Look up tokens: (B, S) -> (B, S, D)."""
        if tensor.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        is_local = (tokens >= self.first_token) & (tokens < self.first_token + rows)
        local = F.embedding((tokens - self.first_token).clamp(0, rows - 1), self.weight)
        return reduce_output(local * is_local.unsqueeze(-1), tensor)


class Head(nn.Module):
    """The output projection: logits, or straight to the loss."""

    def __init__(self, weight: nn.Parameter, z_loss: float, softcap: float) -> None:
        super().__init__()
        self.weight = weight  # (V, D)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, x: Tensor, targets: Tensor | None, tensor: Axis) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Project x (B, S, D).

        Returns:
            Logits (B, S, V); or with targets (B, S) what `linear_cross_entropy` returns.
        """
        if targets is None:
            return gathered_logits(x, self.weight, tensor, self.softcap)
        return linear_cross_entropy(x, self.weight, targets, self.z_loss, tensor=tensor, softcap=self.softcap)


class Decoder(nn.Module):
    """The whole model, or one rank's shard of it.

    Args:
        shape: the resolved sizes.
        model: its group of the configuration.
        backend: of attention, as `attention.choose` returned it.
        document_start: the token that begins a document in packed sequences; None: attention crosses documents.
        mesh: the ranks that share this model.
        products: of the projections in attention and in the feed-forward layers.
    """

    def __init__(
        self,
        shape: Shape,
        model: ModelConfig,
        backend: str,
        document_start: int | None = None,
        mesh: Mesh = Mesh(),
        products: Products = PLAIN,
    ) -> None:
        super().__init__()
        self.shape, self.document_start, self.mesh = shape, document_start, mesh
        self.recompute = model.activation_checkpointing
        rotary = Rotary(shape.head_dim, model.rope_theta)
        self.embedding = Embedding(shape, mesh)
        options = LayerOptions(model, rotary, backend, products)
        self.layers = nn.ModuleList(Layer(shape, i, options, mesh) for i in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, model.norm_eps, _norm_gradient_axis(mesh))
        untied = None if shape.tied else shard_parameter(mesh, (shape.vocab_size, shape.d_model), 0)
        head_weight = self.embedding.weight if untied is None else untied
        self.head = Head(head_weight, model.z_loss, shape.logit_softcap)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute logits, or the loss.

        Args:
            tokens: (B, S). With a cache, the newest tokens only. A context rank is given its shard of each sequence, except
                with a cache: then every rank is given the same tokens.
            targets: (B, S), where -100 is ignored.
            cache: of keys and values; it is extended in place.

        Returns:
            Logits (B, S, V). With targets instead, in fp32: the objective (with z-loss, if there is any), the mean
            cross-entropy in nats over this rank's targets, and that of each target (B, S). Only the objective is
            differentiable.
        """
        mesh = self.mesh if cache is None else self.mesh.for_generation()
        documents = None
        if self.document_start is not None and cache is None:
            documents = Documents((gather_sequence(tokens, mesh.context) == self.document_start).cumsum(1))
        # A recomputed layer would extend a cache twice.
        recompute = self.recompute if self.training and torch.is_grad_enabled() and cache is None else False
        forward_pass = ForwardPass(mesh, len(tokens), documents, cache, recompute)
        x, residual = self.embedding(tokens, mesh.tensor), None
        for layer in self.layers:
            if recompute is True:
                x = x if residual is None else x + residual  # so that one tensor per layer is kept, not two
                outputs = checkpoint(layer, x, None, forward_pass, use_reentrant=False, **_NO_RANDOMNESS)
                x, residual = cast("tuple[Tensor, Tensor]", outputs)
            else:
                x, residual = layer(x, residual, forward_pass)
        x, _ = self.norm(x, residual)
        return self.head(x, targets, mesh.tensor)

    def set_step(self, step: int, of: int) -> None:
        """Give the scheduled parameters of every layer's formula their values after `step` steps of a run of `of` steps."""
        for layer in self.layers:
            cast("Layer", layer).ffn.set_step(step, of)

    def scheduled(self) -> dict[str, float | list[float | None]]:
        """Return the current values of scheduled parameters by name: a list has one per layer, None where it has no such."""
        values = [cast("Layer", layer).ffn.scheduled for layer in self.layers]
        named = {name: [each.get(name) for each in values] for each in values for name in each}
        return {name: each[0] if each[0] is not None and len({*each}) == 1 else each for name, each in named.items()}


def _norm_gradient_axis(mesh: Mesh) -> Axis:
    """Return the ranks over which the gradient of a norm of the residual stream is summed: those that shard its tokens."""
    return mesh.tensor if mesh.tensor.sequence_parallel else Axis()
