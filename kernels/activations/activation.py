"""The differentiable function of a formula: argument checks, choice of the backend, autograd."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..autograd import FirstOrder
from ..formula import Formula
from ..formula.compiled import Compiled, compile_formula
from ..tensors import is_plain, is_transformed, on_gpu
from . import reference
from .reductions import Reducer, WidthRanks, begin_adjoints, reduce_over
from .telemetry import BatchStats

# Namespace of the operators in `ops.py`. The package may be imported under two names, and each registers its own operators.
NAMESPACE = __name__.partition(".")[0]
FIRST_ORDER = FirstOrder("a fused activation", "write it in plain PyTorch")


def _operators() -> Any:
    return getattr(torch.ops, NAMESPACE)


class ActivationBackend(Protocol):
    """The functions of a backend; `reference.py` documents them. For a formula with reductions it is a `Reducer` as well."""

    def forward(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None, /
    ) -> Tensor: ...

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None, /
    ) -> tuple[Tensor, BatchStats]: ...

    def forward_fp8(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool,
        reduced: Tensor | None = None, adjoints: Tensor | None = None, /,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]: ...  # fmt: skip

    def backward_from_output(self, compiled: Compiled, h: Tensor, dh: Tensor, /) -> Tensor: ...


class Activation:
    """`h = f(pre, **learned)`; see `kernels.activation`.

    Where tensor ranks share d_ff, a formula with reductions takes three calls: `reduce` before `forward`, and `begin_backward`
    before `backward`. On one rank the kernels reduce by themselves.
    """

    def __init__(self, formula: Formula, backend: str) -> None:
        self.formula, self.backend = formula, backend
        tensors = {name: parameter.settings() for name, parameter in formula.tensors.items()}
        # Identifies this activation among the arguments of an operator.
        self.key = json.dumps([formula.text, {**formula.fixed, **tensors}, backend])

    @functools.cached_property
    def compiled(self) -> Compiled:
        return compile_formula(self.formula)

    def __call__(self, pre: Tensor, /, **learned: Tensor) -> Tensor:
        """Return h (..., d_ff) of `pre`, which is (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first).

        Raises:
            ValueError: a tensor of another shape, or one that the backend does not support.
            TypeError: a keyword is missing or unknown, or `pre` is not floating-point.
        """
        if not pre.ndim and not self.formula.gated:  # one number, as a row of one channel
            return self(pre.unsqueeze(0), **learned).squeeze(0)
        self.check(pre)
        names = self.formula.tensors
        if learned.keys() != names.keys():
            raise TypeError(f"{self!r} takes {list(names)} as keywords, not {list(learned)}")
        tensors = [learned[name] for name in names]
        FIRST_ORDER.check(pre, *tensors)
        if any(map(is_transformed, (pre, *tensors))):
            return _Transformed.apply(self, pre, *tensors)
        if is_plain(pre):
            return _Elementwise.apply(self, pre, *tensors)
        return _operators().forward(pre, tensors, self.key)

    def check(self, pre: Tensor) -> None:
        """Refuse pre-activations whose shape or dtype does not fit the formula.

        Raises:
            ValueError: no axis of channels, or a gated formula without an axis of 2.
            TypeError: not a floating dtype.
        """
        if self.formula.gated and (pre.ndim < 2 or pre.shape[-2] != 2):
            raise ValueError(f"a gated formula takes pre-activations (..., 2, d_ff), not {tuple(pre.shape)}")
        if not pre.ndim:
            raise ValueError("pre-activations are (..., d_ff), not a single number")
        if not pre.is_floating_point():
            raise TypeError(f"pre-activations are floating-point numbers, not {pre.dtype}")

    def prepare(self, device: torch.device, dtype: torch.dtype, with_stats: bool = False) -> None:
        """Differentiate the formula and build its kernels now rather than at the first call.

        Args:
            with_stats: also build the kernel of `forward_with_stats`.

        Raises:
            FormulaError: it overflows where its value is moderate.
            ValueError: the backend cannot compute this dtype on this device.
        """
        assert self.compiled
        empty = torch.empty((0, 2, 0) if self.formula.gated else (0, 0), dtype=dtype, device=device)
        backend = self._backend(empty)
        if with_stats:
            learned = [
                torch.zeros(p.size(0), dtype=torch.float32, device=device)
                for p in self.compiled.formula.tensors.values()
            ]
            backend.forward_with_stats(self.compiled, empty, learned)

    def reduce(self, pre: Tensor, learned: Sequence[Tensor], ranks: WidthRanks) -> Tensor | None:
        """Return what the formula reduces over d_ff of all ranks, a few numbers per token; None if `forward` does it.

        Collective over the ranks; see `reductions.py` for the shape.
        """
        if not self.formula.reduces or ranks.size == 1:
            return None
        self._check_forward(pre, learned)
        reducer = cast("Reducer", self._backend(pre))
        return reduce_over(reducer, self.compiled, pre.contiguous(), self._by_channel(pre, learned), ranks)

    def forward(self, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None) -> Tensor:
        """Compute h without recording a gradient.

        Args:
            learned: in the formula's order, then the scheduled parameters in theirs.
            reduced: as `reduce` returns it.
        """
        if is_plain(pre) or reduced is not None:
            return self.compute(pre, learned, reduced)
        return _operators().forward(pre, list(learned), self.key)

    def forward_with_stats(
        self, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, BatchStats]:
        """Return h, equal to that of `forward` to the last bit, and its statistics (`telemetry.py`).

        Raises:
            TypeError: tensors that torch.compile traces, or that have no data of their own.
        """
        if not is_plain(pre):
            raise TypeError("statistics are taken in eager mode, of plain tensors")
        self._check_forward(pre, learned, reduced)
        return self._backend(pre).forward_with_stats(
            self.compiled, pre.contiguous(), self._by_channel(pre, learned), reduced
        )

    def forward_fp8(
        self, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute h in FP8 (E4M3), scaled by the largest magnitude of its row; on a GPU in the pass that computes h.

        Returns:
            h / scale (..., d_ff) in FP8, rounded once from fp32, and the scale (..., 1) in fp32.

        Raises:
            TypeError: tensors that torch.compile traces, or that have no data of their own.
        """
        if not is_plain(pre):
            raise TypeError("h is written in FP8 in eager mode, of plain tensors")
        self._check_forward(pre, learned, reduced)
        return self._backend(pre).forward_fp8(self.compiled, pre.contiguous(), self._by_channel(pre, learned), reduced)

    def begin_backward(
        self, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor, with_h: bool, ranks: WidthRanks
    ) -> tuple[Tensor | None, Callable[[], Tensor]]:
        """Return h if `with_h`, and a function that waits for the adjoints of the reductions, over d_ff of all ranks.

        Collective over the ranks. The first exchange is in flight until the function is called.
        """
        self._check_backward(pre, dh, learned, reduced)
        reducer = cast("Reducer", self._backend(pre))
        pre, dh = pre.contiguous(), dh.contiguous()
        return begin_adjoints(reducer, self.compiled, pre, dh, self._by_channel(pre, learned), reduced, with_h, ranks)

    def backward(
        self, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool = False, reduced: Tensor | None = None,
        adjoints: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        """Compute the gradients of `pre` and of `learned` from that of h, all in one pass.

        Args:
            reduced, adjoints: those of `reduce` and `begin_backward`, where tensor ranks share d_ff.

        Returns:
            The gradient of `pre`, of its shape; h if `with_h`; and the gradient of each learned parameter. A scheduled one
            has none.
        """
        if is_plain(pre) or reduced is not None:
            return self.compute_backward(pre, dh, learned, with_h, reduced, adjoints)
        dpre, *rest = _operators().backward(pre, dh, list(learned), self.key, with_h)
        return dpre, rest.pop(0) if with_h else None, rest

    def backward_from_output(self, h: Tensor, dh: Tensor) -> Tensor:
        """Compute the gradient of the pre-activation from the output; for formulas with a `from_output`."""
        self._check_memory(h, dh, ())
        return self._backend(h).backward_from_output(self.compiled, h.contiguous(), dh.contiguous())

    def compute(self, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None) -> Tensor:
        """Compute `forward` of plain tensors, without the operator."""
        self._check_forward(pre, learned, reduced)
        return self._backend(pre).forward(self.compiled, pre.contiguous(), self._by_channel(pre, learned), reduced)

    def compute_backward(
        self, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool, reduced: Tensor | None = None,
        adjoints: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        """Compute `backward` of plain tensors, without the operator."""
        self._check_backward(pre, dh, learned, reduced, adjoints)
        pre, dh = pre.contiguous(), dh.contiguous()
        tensors = self._by_channel(pre, learned)
        dpre, h, dlearned = self._backend(pre).backward(self.compiled, pre, dh, tensors, with_h, reduced, adjoints)
        return dpre, h, self._by_group(dlearned)

    def _check_backward(
        self, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor | None, adjoints: Tensor | None = None
    ) -> None:
        self.check(pre)
        h = pre[..., 0, :] if self.formula.gated else pre
        self._check_memory(h, dh, learned)
        self._check_numbers(h, reduced=reduced, adjoints=adjoints)

    def _by_channel(self, pre: Tensor, learned: Sequence[Tensor]) -> list[Tensor]:
        """Return the learned parameters as kernels read them: those of groups repeated for each of their channels."""
        width, parameters = pre.shape[-1], self.formula.tensors.values()
        return [
            tensor[:, None].expand(-1, width // len(tensor)).flatten() if p.share == "group" else tensor
            for p, tensor in zip(parameters, learned, strict=True)
        ]

    def _by_group(self, dlearned: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the learned parameters from those of `_by_channel`."""
        return [
            gradient.unflatten(0, (p.groups, gradient.numel() // p.groups)).sum(1) if p.share == "group" else gradient
            for p, gradient in zip(self.formula.learned.values(), dlearned, strict=True)
        ]

    def _check_forward(self, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None) -> None:
        self.check(pre)
        h = pre[..., 0, :] if self.formula.gated else pre
        self._check_memory(h, None, learned)
        self._check_numbers(h, reduced=reduced)

    def _check_numbers(self, h: Tensor, **given: Tensor | None) -> None:
        """Refuse `reduced` or `adjoints` that are not one contiguous row of numbers per token.

        Raises:
            ValueError: with the shape that is needed.
        """
        rows, dtype = h.shape[:-1].numel(), torch.promote_types(h.dtype, torch.float32)
        for what, tensor in given.items():
            if tensor is None:
                continue
            reductions = self.compiled.reductions
            shape = (rows, len(reductions.names if what == "reduced" else reductions.adjoints))
            needed = shape, dtype, h.device, True
            if (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.is_contiguous()) != needed:
                raise ValueError(
                    f"{what} must be {shape} {dtype} on {h.device} and contiguous, "
                    f"not {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )

    def _check_memory(self, h: Tensor, dh: Tensor | None, learned: Sequence[Tensor]) -> None:
        """Refuse tensors with which a kernel would read or write out of bounds, or misread a dtype.

        Args:
            h: the output, or anything of its shape, dtype and device.

        Raises:
            ValueError: a gradient or a learned parameter does not fit.
        """
        if dh is not None and (dh.shape, dh.dtype, dh.device) != (h.shape, h.dtype, h.device):
            raise ValueError(
                f"the gradient of h is {tuple(dh.shape)} {dh.dtype} on {dh.device}, "
                f"and h is {tuple(h.shape)} {h.dtype} on {h.device}"
            )
        if len(learned) != len(self.formula.tensors):
            raise ValueError(f"{self!r} takes {list(self.formula.tensors)}, but {len(learned)} tensors were given")
        for (name, parameter), tensor in zip(self.formula.tensors.items(), learned, strict=True):
            size = parameter.size(h.shape[-1])
            if parameter.share == "group" and h.shape[-1] % size:
                raise ValueError(f"the parameter {name!r} has {size} groups, which do not divide d_ff={h.shape[-1]}")
            if tuple(tensor.shape) != (size,) or tensor.device != h.device:
                raise ValueError(
                    f"the parameter {name!r}, one per {parameter.share}, must be ({size},) on {h.device}, "
                    f"not {tuple(tensor.shape)} on {tensor.device}"
                )

    def _backend(self, pre: Tensor) -> ActivationBackend:
        """Return the backend for tensors like `pre`."""
        if self.backend == "reference":
            return reference
        if self.backend == "triton" or (self.backend == "auto" and on_gpu(pre)):
            from ..triton import runtime
            from . import triton_backend

            if runtime.serves(pre):
                return triton_backend.kernels_of(self.compiled)
            if self.backend == "triton":
                raise runtime.refusal(pre)
            runtime.warn_if_missing()
        from ..c.library import serves
        from . import c_backend

        if serves(pre):
            return c_backend.kernels_of(self.compiled) or reference
        if self.backend == "c":
            raise ValueError(f"the C backend computes fp32 and bf16 on a CPU, not {pre.dtype} on {pre.device.type}")
        return reference

    def __repr__(self) -> str:
        return f"Activation({self.formula.text!r}, backend={self.backend!r})"

    def __reduce__(self) -> tuple[type[Activation], tuple[Formula, str]]:
        return Activation, (self.formula, self.backend)  # what SymPy made of the formula cannot be pickled

    def __deepcopy__(self, _: dict[int, Any]) -> Activation:
        return self  # nothing in it changes


class _Elementwise(torch.autograd.Function):
    """The activation as an autograd function: saves the pre-activations, computes all gradients from them in one pass."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, pre: Tensor, *learned: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(pre, *learned)
        return activation.forward(pre, learned)

    @staticmethod
    @FIRST_ORDER.once
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        pre, *learned = ctx.saved_tensors
        dpre, _, dlearned = ctx.activation.backward(pre, dh, learned)
        gradients = [d.to(p.dtype) for d, p in zip(dlearned, learned, strict=False)]
        return None, dpre, *gradients, *[None] * (len(learned) - len(gradients))  # scheduled parameters have none


class _Transformed(torch.autograd.Function):
    """The same in the form that torch.func can unwrap, as it cannot an operator; PyTorch spends more on a call of this form."""

    @staticmethod
    def forward(activation: Activation, pre: Tensor, *learned: Tensor) -> Tensor:
        return activation.forward(pre, learned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.activation, *tensors = inputs
        ctx.save_for_backward(*tensors)

    backward = _Elementwise.backward
