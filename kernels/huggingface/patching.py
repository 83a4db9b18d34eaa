"""Fused feed-forward layers for models of Transformers.

    from formula_ffn import patch, unpatch
    print(patch(model))        # 22 feed-forward layers: silu(gate) * up

`patch` replaces the forward of every feed-forward layer that it knows by the fused one of `mlp.py`, with the layer's own
activation or with a formula of yours. The weights stay where they are, under their names. `layers.py` says which layers are
known, and checks it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import activation
from ..activations.activation import Activation
from ..mlp import is_direct, new_learned, run_mlp
from .layers import (
    LEARNED,
    Layout,
    PatchError,
    Source,
    check_twin,
    check_unknown,
    hidden_width,
    layout_of,
    own_activation,
    replaced,
)


@dataclass
class Patched:
    """What `patch` did; its text says so."""

    layers: dict[str, str] = field(default_factory=dict)  # the formula of each fused layer, by the layer's name
    by_modules: list[str] = field(default_factory=list)  # those of them whose projections are not plain linear modules
    skipped: dict[str, str] = field(default_factory=dict)  # why a layer was not taken, by its name

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        counts = Counter(self.layers.values())
        text = f"{len(self)} feed-forward layer{'s' if len(self) != 1 else ''}: " + ", ".join(
            formula if len(counts) == 1 else f"{formula} ({count})" for formula, count in counts.items()
        )
        if self.by_modules:
            text += (
                f"; in {len(self.by_modules)} of them only the activation is fused, as their projections are wrapped"
            )
        if self.skipped:
            text += f"; not taken: {_grouped(self.skipped)}"
        return text


def patch(
    model: nn.Module,
    formula: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    backend: str = "auto",
    strict: bool = True,
) -> Patched:
    """Fuse every feed-forward layer of a model, and return which were taken.

    Layers with `gate_proj`, `up_proj` and `down_proj` are taken, those with a packed `gate_up_proj` and `down_proj`, those with
    `up_proj` and `down_proj`, and some that name the same differently. Parameters, their names and the state dict stay as they
    are. Where a hook, an adapter or quantization is attached to a projection, its module is called and only the activation is
    fused. A layer that was patched before is patched anew. Its activation is read once, here: `layer.act_fn = ...` afterwards
    has no effect until the model is patched again.

    Args:
        model: of Transformers, or any other module with such layers.
        formula: what replaces the layers' own activation: of `gate` and `up` for gated layers, of `x` for others.
        parameters: of the formula, as `activation` takes them. Learned ones become parameters of every layer, under
            `formula_parameters`.
        backend: "auto", "reference", "c" or "triton"; see `activation`.
        strict: refuse the model if it has a feed-forward layer that is not known; else leave that layer as it is.

    Raises:
        PatchError: a layer is not known (if `strict`), or none is; the model is unchanged.
        FormulaError: the formula is refused.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from formula_ffn import patch, unpatch
        >>> config = LlamaConfig(
        ...     hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> print(patch(model))
        2 feed-forward layers: silu(gate) * up
        >>> print(patch(model, "relu(gate)**2 * up"))
        2 feed-forward layers: relu(gate)**2 * up
        >>> unpatch(model)
        2
    """
    done, plans = Patched(), {}
    given = None if formula is None else activation(formula, parameters, backend)
    for name, module in model.named_modules():
        try:
            if (plan := _plan(module, given, backend)) is not None:
                plans[name] = (module, *plan)
        except PatchError as error:
            done.skipped[name or type(module).__name__] = f"{type(module).__name__}: {error}"
    _refuse(model, done.skipped, strict, nothing=not plans)
    for name, (module, layout, source) in plans.items():
        _bind(module, layout, source)
        done.layers[name] = source.function.formula.text
        if not all(is_direct(child) for child in layout.projections(module) if child is not None):
            done.by_modules.append(name)
    return done


def _plan(module: nn.Module, given: Activation | None, backend: str) -> tuple[Layout, Source] | None:
    """Return how to fuse a module; None if it is no feed-forward layer.

    Raises:
        PatchError: it is one that is not known.
    """
    layout = layout_of(module)
    if layout is None:
        check_unknown(module)
        return None
    if "forward" in module.__dict__ and not is_patched(module):
        raise PatchError("its forward was already replaced")
    own = own_activation(module, layout, backend)
    check_twin(module, layout, own)
    return layout, own if given is None else replaced(module, layout, given)


def _refuse(model: nn.Module, skipped: Mapping[str, str], strict: bool, nothing: bool) -> None:
    """Raise PatchError if a layer was skipped under `strict`, or if there is nothing to fuse."""
    if skipped and strict:
        raise PatchError(f"not fused: {_grouped(skipped)}. The model is unchanged; strict=False takes the other layers")
    if nothing:
        raise PatchError(
            f"{type(model).__name__} has no feed-forward layer that is known: one has gate_proj, up_proj and down_proj, "
            "gate_up_proj and down_proj, or up_proj and down_proj" + (f". {_grouped(skipped)}" if skipped else "")
        )


def unpatch(model: nn.Module) -> int:
    """Give the layers that `patch` took their own forward again, and return how many they are.

    Example:
        >>> from formula_ffn import patch, unpatch
        >>> from transformers import ArceeConfig
        >>> from transformers.models.arcee.modeling_arcee import ArceeMLP
        >>> layer = ArceeMLP(ArceeConfig(hidden_size=64, intermediate_size=256))
        >>> print(patch(layer))
        1 feed-forward layer: relu(x)**2
        >>> unpatch(layer)
        1
    """
    count = 0
    for module in model.modules():
        if is_patched(module):
            del module.__dict__["forward"]
            module._modules.pop(LEARNED, None)
            count += 1
    return count


def is_patched(layer: nn.Module) -> bool:
    """Whether the forward of a layer is the fused one."""
    return isinstance(layer.__dict__.get("forward"), FusedForward)


class FusedForward:
    """The forward of a patched layer, bound to it."""

    def __init__(self, layer: nn.Module, layout: Layout, source: Source) -> None:
        self.layer, self.layout, self.source = layer, layout, source

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Run the layer; its one input has another name in every model."""
        (x,) = (*inputs, *named.values())
        function, holder = self.source.function, self.layer._modules.get(self.source.module)
        if holder is not None and (holder._forward_hooks or holder._forward_pre_hooks):
            return type(self.layer).forward(self.layer, x)  # the hooks of an activation must fire
        return run_mlp(function, x, *self.layout.projections(self.layer), self.source.learned(self.layer))


def _bind(module: nn.Module, layout: Layout, source: Source) -> None:
    module._modules.pop(LEARNED, None)
    if source.module == LEARNED:
        weight = next(module.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        module.add_module(LEARNED, new_learned(source.function, hidden_width(module, layout), weight.device, dtype))
    module.__dict__["forward"] = FusedForward(module, layout, source)


def _grouped(reasons: Mapping[str, str]) -> str:
    """Return the reasons, each once, with the layers that it is about."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}, a {reason}"
        for reason, names in groups.items()
    )
