"""What the fused functions have of autograd, first derivatives in reverse mode, and the sentences that refuse the rest.

PyTorch by itself is silent there. `torch.autograd.function.once_differentiable` hangs on no input, so a Hessian comes out as
zeros; and an operator without a rule for forward mode drops the tangent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_legacy_batchedtensor,
    maybe_get_level,
)
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Tensor | None, ...]]


class FirstOrder(NamedTuple):
    """The refusals of a function that has first derivatives in reverse mode only.

    Attributes:
        name: of the function, the subject of a sentence.
        instead: what a user does who needs more, in the imperative.
    """

    name: str
    instead: str

    def once(self, backward: Backward) -> Backward:
        """Let a backward, (ctx, *gradients) -> gradients, record a node that raises where it is differentiated again.

        The node hangs on the incoming gradients, on the saved tensors, and on `ctx.link` (`link_to`), which a function has that
        does not save its inputs: a second derivative arrives by any of them.
        """

        @functools.wraps(backward)
        def recorded(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
            if torch.compiler.is_compiling():
                return backward(ctx, *gradients)
            self.check(*gradients)
            # torch.autograd.grad(is_grads_batched=True) hides a dimension by a vmap of its own.
            if any(gradient is not None and is_legacy_batchedtensor(gradient) for gradient in gradients):
                raise self.of_vmap()
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            saved, link, present = ctx.saved_tensors, getattr(ctx, "link", None), []
            linked = () if link is None else (link.tensor,)

            def compute(tensors: Sequence[Any]) -> tuple[Tensor, ...]:
                results = backward(
                    _Context(ctx, tensors[: len(saved)]), *tensors[len(saved) : len(saved) + len(gradients)]
                )
                present.extend(result is not None for result in results)
                return tuple(result for result in results if result is not None)

            computed = iter(_Once.apply(self, compute, *saved, *gradients, *linked))
            return tuple(next(computed) if each else None for each in present)

        return recorded

    def of_second_derivatives(self) -> RuntimeError:
        """Return the exception for a second derivative."""
        return RuntimeError(f"{self.name} can be differentiated once: {self.instead} for second derivatives")

    def of_vmap(self) -> NotImplementedError:
        """Return the exception for a hidden dimension."""
        return NotImplementedError(
            f"{self.name} has no batching rule for vmap, nor for jacobians by it: {self.instead} for these"
        )

    def check(self, *tensors: Tensor | None) -> None:
        """Refuse tensors of forward mode and of vmap; while torch.compile traces, forward mode alone.

        Raises:
            NotImplementedError: with what to do instead.
        """
        compiling = torch.compiler.is_compiling()
        if forward_ad._current_level < 0 and (compiling or not torch._C._are_functorch_transforms_active()):
            return
        for tensor in tensors:
            if tensor is None:
                continue
            if forward_ad._current_level >= 0 and (compiling or is_dual(tensor)):
                raise NotImplementedError(
                    f"{self.name} has no forward-mode derivatives (jvp, jacfwd): {self.instead} for these"
                )
            if not compiling and TransformType.Vmap in _transforms_of(tensor):
                raise self.of_vmap()

    def check_no_transforms(self, *tensors: Tensor | None) -> None:
        """Refuse tensors of all transforms of torch.func, `grad` among them.

        Raises:
            NotImplementedError: with what to do instead.
        """
        self.check(*tensors)
        if not torch.compiler.is_compiling() and any(t is not None and _transforms_of(t) for t in tensors):
            raise NotImplementedError(f"{self.name} is differentiated by backward(), not by torch.func: {self.instead}")


class Link:
    """Holds an empty tensor that depends on others: their graph without their memory.

    Not a tensor itself, so autograd does not see it among the arguments of a function.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def link_to(*tensors: Tensor | None) -> Link | None:
    """Return a link to the inputs of a function that does not save them all; None where there is no second derivative."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    return Link(_Joined.apply(*(tensor for tensor in tensors if tensor is not None)))


def is_dual(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward mode."""
    if forward_ad._current_level < 0:  # outside of every jvp
        return False
    transforms = _transforms_of(tensor)
    return TransformType.Jvp in transforms or (not transforms and forward_ad.unpack_dual(tensor).tangent is not None)


def _transforms_of(tensor: Tensor) -> list[TransformType]:
    """Return the transforms of torch.func that wrap a tensor, the innermost first."""
    found = []
    if torch._C._are_functorch_transforms_active():
        keys = {interpreter.level(): interpreter.key() for interpreter in get_interpreter_stack() or ()}
        while (level := maybe_get_level(tensor)) > 0:
            if level in keys:  # else the transform has ended
                found.append(keys[level])
            tensor = get_unwrapped(tensor)
    return found


class _Context:
    """The context of a backward with other saved tensors: torch.func has unwrapped them."""

    def __init__(self, ctx: Any, saved_tensors: Sequence[Any]) -> None:
        self.ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated again."""

    @staticmethod
    def forward(_: FirstOrder, compute: Callable[..., tuple[Tensor, ...]], *tensors: Any) -> tuple[Tensor, ...]:
        return compute(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.refusal = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        raise ctx.refusal.of_second_derivatives()


class _Joined(torch.autograd.Function):
    """See `Link`; a second derivative is refused before it arrives here."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass
