"""The flash-attn packages: three generations, of three names, behind one pair of functions.

    flash_attn.cute        the package flash-attn-4, for Hopper and later; a wheel without compiled code
    flash_attn_interface   flash-attn 3, for Hopper
    flash_attn             flash-attn 2, for Ampere and later

Any of them may be installed and not work: flash-attn-4 alone leaves a namespace package `flash_attn` without functions, and a
wheel compiled for another torch fails when it is imported. So a package counts as installed when its functions were imported.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Module, oldest and newest major version of the GPUs it serves (None: any later one); the first that can be imported counts.
_PACKAGES = (("flash_attn.cute", 9, None), ("flash_attn_interface", 9, 9), ("flash_attn", 8, None))


@dataclasses.dataclass(frozen=True)
class FlashAttention:
    """A flash-attn package that was imported. `module` is its name."""

    module: str
    dense: Callable[..., Any]
    varlen: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute causal attention of q (B, S, H, E) and k, v (B, S, K, E); returns (B, S, H, E)."""
        return _first(self.dense(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled()))

    def packed(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """Compute causal attention within documents of a packed sequence of N tokens.

        Args:
            q: (N, H, E).
            k, v: (N, K, E).
            bounds: int32, the first token of each document, and N.
            longest: tokens of the longest document.

        Returns:
            (N, H, E).
        """
        out = self.varlen(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return _first(out)


@functools.cache
def find_flash_attention(capability: tuple[int, int]) -> tuple[FlashAttention | None, str]:
    """Import the newest flash-attn package that serves a GPU.

    Args:
        capability: of the GPU, as (9, 0) for sm_90.

    Returns:
        The package, or None and why there is none: "is not installed", or that it cannot be imported.
    """
    why = "is not installed"
    for module, oldest, newest in _PACKAGES:
        if capability[0] < oldest or (newest is not None and capability[0] > newest):
            continue
        try:
            if importlib.util.find_spec(module) is None:
                continue
            imported = importlib.import_module(module)
            return FlashAttention(module, imported.flash_attn_func, imported.flash_attn_varlen_func), ""
        except ModuleNotFoundError as error:  # of its parent, for a dotted name; or of what the package itself needs
            if error.name and not module.startswith(error.name):
                why = f"cannot be imported ({module} needs {error.name})"
        except AttributeError:  # a namespace package that another generation left
            continue
        except Exception as error:
            why = f"cannot be imported ({module}: {_one_line(error)})"
    return None, why


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of a function that may return the log-sum-exp beside it."""
    return out[0] if isinstance(out, tuple) else out


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
