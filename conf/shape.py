"""The shape of a decoder, resolved from a configuration: widths, heads, rows of the embedding, and the arm of each layer.

`launch/estimate/counts.py` counts what a shape costs; `model/decoder.py` builds it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from conf.arms import Arm, check_groups, layer_arms, width_of
from conf.schema import Config, FFNConfig, ModelConfig, ParallelConfig
from kernels.common.errors import UserError
from kernels.formula import Formula

Number = TypeVar("Number", int, float)
VOCABULARY_MULTIPLE = 64  # of the embedding's rows, so that GEMM tiles and tensor ranks divide them


@dataclasses.dataclass(frozen=True)
class FFNShape:
    """One feed-forward layer, fully resolved."""

    arm: FFNConfig
    formula: Formula
    d_ff: int

    @property
    def matrices(self) -> int:
        """3 for a gated arm, 2 for an ungated one."""
        return self.formula.matrices

    @property
    def reduced(self) -> int:
        """Numbers per token that the formula's reductions over d_ff keep for backward, where tensor ranks share d_ff."""
        return sum(self.formula.reductions.values())

    @property
    def adjoints(self) -> int:
        """Numbers per token that backward of the reductions needs from all tensor ranks."""
        return len(self.formula.reductions)

    @property
    def learned_per_layer(self) -> int:
        """Numbers that the formula learns once for the whole layer."""
        return sum(parameter.share == "layer" for parameter in self.formula.learned.values())

    @property
    def learned(self) -> int:
        """All numbers that the formula learns."""
        return sum(parameter.size(self.d_ff) for parameter in self.formula.learned.values())

    def parameters(self, d_model: int) -> int:
        """Return the parameters of the layer."""
        return self.matrices * d_model * self.d_ff + self.learned


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder, fully resolved."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: tuple[FFNShape, ...]  # per layer
    vocab_size: int  # rows of the embedding, the tokenizer's rounded up
    tied: bool
    qk_norm: bool
    logit_softcap: float = 0.0

    @functools.cached_property
    def ffn_counts(self) -> tuple[tuple[FFNShape, int], ...]:
        """The feed-forward layers that differ, and how many there are of each: what is counted of one holds for all."""
        counts = Counter(map(id, self.ffn))
        return tuple((layer, counts[number]) for number, layer in {id(layer): layer for layer in self.ffn}.items())

    def ffn_sum(self, value: Callable[[FFNShape], Number]) -> Number:
        """Return the sum over all layers of what `value` says of a feed-forward layer."""
        return sum(number * value(layer) for layer, number in self.ffn_counts)


def shape_of(config: Config, tokenizer_size: int | None = None) -> Shape:
    """Resolve the decoder's shape.

    Args:
        config: the run's configuration.
        tokenizer_size: pieces of the tokenizer; None: it does not exist yet, and `tokenizer.vocab_size` is taken.
    """
    model = config.model
    arms = layer_arms(config)
    by_arm = {id(arm): _ffn_shape(arm, model) for arm in {id(arm): arm for arm in arms}.values()}
    pieces = config.tokenizer.vocab_size if tokenizer_size is None else tokenizer_size
    return Shape(
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        head_dim=model.head_dim or model.d_model // model.n_heads,
        ffn=tuple(by_arm[id(arm)] for arm in arms),
        vocab_size=model.vocab_size or -(-pieces // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        tied=model.tie_embeddings,
        qk_norm=model.qk_norm,
        logit_softcap=model.logit_softcap,
    )


def _ffn_shape(arm: Arm, model: ModelConfig) -> FFNShape:
    selective = model.activation_checkpointing == "selective"
    config = dataclasses.replace(arm.config, save="input") if selective else arm.config
    return FFNShape(config, arm.formula, width_of(arm.formula, model))


def check_divisibility(shape: Shape, parallel: ParallelConfig) -> None:
    """Refuse tensor and context sizes that do not divide the heads, widths and vocabulary.

    Raises:
        UserError: what is not divisible, and the sizes that would do.
    """
    tensor, context = parallel.tensor, parallel.context
    widths = {f"the d_ff={layer.d_ff} of ffn={layer.arm.name}": layer.d_ff for layer, _ in shape.ffn_counts}
    heads = {f"the {shape.n_heads} heads": shape.n_heads, f"the {shape.n_kv_heads} key/value heads": shape.n_kv_heads}
    vocabulary = {f"the vocabulary of {shape.vocab_size} rows": shape.vocab_size}
    for what, size in (heads | widths | vocabulary).items():
        if size % tensor:
            common = math.gcd(*heads.values(), *widths.values(), *vocabulary.values())
            raise UserError(
                f"parallel.tensor={tensor} does not divide {what}: this model can be sharded over "
                f"{_listed(common)} rank(s) (model.n_heads, model.n_kv_heads, model.d_ff and model.vocab_size decide)"
            )
    for layer, _ in shape.ffn_counts:
        check_groups(layer.formula, layer.d_ff, tensor, layer.arm.name)
    for what, size in heads.items():
        if size // tensor % context:
            each = "" if tensor == 1 else f", of which a tensor rank has {size // tensor}"
            raise UserError(
                f"parallel.context={context} does not divide {what}{each}: around attention each rank takes an equal "
                f"number of heads; {_listed(math.gcd(*heads.values()) // tensor)} would do"
            )


def _listed(number: int) -> str:
    """Write the divisors of a number."""
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    return " or ".join(filter(None, (", ".join(divisors[:-1]), divisors[-1])))
