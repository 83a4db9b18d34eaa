"""Silent corruption: weights that differ between replicas, and gradients that differ when they are computed twice.

`guard.replicas=N` compares checksums of what data-parallel ranks hold alike: the weights under ZeRO 0 to 2, and under stage 0
the moments too. Under ZeRO 3, and for the masters and moments of stages 1 and 2, no two ranks hold the same. `guard.repeat=N`
computes the gradient of a batch twice, past DeepSpeed, and compares it bit for bit. Both end the run with the rank named.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.common.errors import Failure
from model.finite import readable
from model.weights import stored_name

if TYPE_CHECKING:
    from training.engine import Engine

_BLOCK = 1 << 22  # elements summed at once
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes per element


def checksum(values: Tensor) -> Tensor:
    """Return two sums mod 2^64 of a tensor's bits, the second weighted by position: int64, (2,), on its device.

    Any one element that differs changes the first; integers make them independent of the order of summation.
    """
    bits = values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK].long()
        places = torch.arange(start + 1, start + 1 + len(block), device=values.device)
        sums += torch.stack([block.sum(), (block * places).sum()])
    return sums


def compare_replicas(engine: Engine) -> None:
    """Compare what data-parallel ranks hold alike. Collective.

    Raises:
        Failure: a rank differs from the others; the same sentence on every rank.
    """
    named = list(_replicated(engine))
    own = torch.cat([torch.tensor([[engine.mesh.tensor.rank] * 2], device=engine.device), *_rows(named)])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    sums = [row.tolist() for row in rows]  # by rank, then by tensor, after a row with the tensor rank
    for tensor_rank in range(engine.mesh.tensor.size):
        ranks = [rank for rank, row in enumerate(sums) if row[0][0] == tensor_rank]
        for number, (name, _) in enumerate(named, start=1):
            held = collections.defaultdict(list)
            for rank in ranks:
                held[tuple(sums[rank][number])].append(rank)
            if len(held) > 1:
                raise Failure(_sentence(readable(name), list(held.values())))


def _replicated(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield what data-parallel ranks hold alike, by stored names, in the same order on every rank."""
    for name, parameter in engine.module.named_parameters():
        yield name, parameter.data
        if engine.stage == 0:
            state = engine.optimizer.state.get(parameter, {})
            yield from ((stored_name(name, key), values) for key, values in state.items() if key != "step")


def _rows(named: list[tuple[str, Tensor]]) -> list[Tensor]:
    return [checksum(values)[None] for _, values in named]


def _sentence(name: str, groups: list[list[int]]) -> str:
    *fewer, most = sorted(groups, key=len)
    if len(fewer[-1]) == len(most):
        listed = "; ".join(f"rank {', '.join(map(str, group))}" for group in sorted(groups))
        return f"ranks hold different bits in {name} ({listed}), and there is no majority: {_ADVICE}"
    wrong = sorted(rank for group in fewer for rank in group)
    ranks = f"rank {wrong[0]} holds" if len(wrong) == 1 else f"ranks {', '.join(map(str, wrong))} hold"
    return f"{ranks} other bits in {name} than the {len(most)} ranks that agree: {_ADVICE}"


_ADVICE = "check the hardware, and go back to a checkpoint before the last comparison that held (resume_from=step_N)"


def compare_repeated(engine: Engine, tokens: Tensor) -> None:
    """Compute the gradient of a batch twice, before any reduction, and compare. Collective.

    Args:
        tokens: (sequences of this data rank, S + 1).

    Raises:
        Failure: a rank computed different bits; the same sentence on every rank.
    """
    first, second = _gradient_sums(engine, tokens), _gradient_sums(engine, tokens)
    differing = next((name for name, sums in first.items() if not torch.equal(sums, second[name])), "")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, differing)
    for rank, name in enumerate(found):
        if name:
            raise Failure(
                f"rank {rank} computed two different gradients of {name} from the same samples: check the hardware of its node"
            )


def _gradient_sums(engine: Engine, tokens: Tensor) -> dict[str, Tensor]:
    """Return the checksum of each parameter's gradient of one micro-batch, and of its objective."""
    sums: dict[str, Tensor] = {}

    def see(name: str, gradient: Tensor) -> None:
        sums[name] = checksum(gradient)

    objective = engine.watch_gradients(tokens[: engine.batch.micro_batch], see)
    return {"the loss": checksum(objective), **sums}
