"""From the configuration to a DeepSpeed engine, and the few places where DeepSpeed has to be told, or watched.

The DeepSpeed configuration is built here and nowhere else. Its defaults that would change the training without a word (clipping
at 1.0, gradients reduced in bf16) are always written out. Everything private that is used is named in
tests/training/test_deepspeed_contract.py, so that an upgrade fails loudly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import Config, ParallelConfig
from conf.validate import Batch
from data.batches import IGNORED
from launch.estimate.counts import GATHERED_BUCKETS, Shape
from launch.ranks import Ranks
from model.decoder import Cache, Decoder
from model.initialise import initialise
from model.parallel import Mesh, cut_of, join
from training.mpu import ModelParallelUnit


def start_process_group(ranks: Ranks, device: torch.device, timeout_minutes: float) -> None:
    """Join the ranks of this run: NCCL on GPUs, gloo on CPUs. One rank alone needs no port."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def join_mesh(parallel: ParallelConfig) -> Mesh:
    """Make the groups that the configuration asks for. Collective."""
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    return join(parallel.tensor, parallel.context, parallel.sequence, timeout)


def deepspeed_config(config: Config, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration as the dictionary that `deepspeed.initialize` takes.

    To DeepSpeed a context rank is one more data-parallel rank: it too has a micro-batch of its own, of parts of sequences, and
    the gradient is the mean over all of them.
    """
    zero, bf16 = config.zero, dtype == torch.bfloat16
    # With nobody to share with stage 1 is stage 0, which DeepSpeed does in half the time. In bf16 see below.
    stage = 0 if _alone(config, batch) and not bf16 else zero.stage
    result: dict[str, Any] = {
        "train_batch_size": batch.global_batch * config.parallel.context,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        # Written even when 0: unset means 1.0 to DeepSpeed. Stage 0 is clipped in `_norm_without_zero`.
        "gradient_clipping": config.optim.clip if stage else 0.0,
        # Of several micro-batches: the bf16 gradients are dropped once they are summed; of one it is the slower way.
        "bf16": {"enabled": bf16, "immediate_grad_update": batch.accumulation > 1},
        "communication_data_type": config.precision.reduce if bf16 else "fp32",
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW: nothing is compiled
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": zero.bucket_elements,
            "allgather_bucket_size": zero.bucket_elements,
            "overlap_comm": zero.overlap,
            "contiguous_gradients": True,
        },
    }
    if zero.offload_optimizer:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if zero.stage == 3:
        result["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": zero.bucket_elements,
            "stage3_max_live_parameters": GATHERED_BUCKETS * zero.bucket_elements,
            "stage3_max_reuse_distance": GATHERED_BUCKETS * zero.bucket_elements,
            "stage3_param_persistence_threshold": min(100_000, zero.bucket_elements),
            "sub_group_size": 10**9,
        }
        if zero.offload_parameters:
            result["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if bf16 and (batch.accumulation > 1 or _alone(config, batch)):
        # Micro-batches are summed in fp32: a bf16 sum of many loses the small ones. And where there is nothing to partition,
        # DeepSpeed's optimizer for fp32 sums takes half as long a step as the one that partitions.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _alone(config: Config, batch: Batch) -> bool:
    """Whether stage 1 has nobody to share with."""
    zero, replicas = config.zero, batch.data_parallel * config.parallel.context
    return zero.stage == 1 and not zero.offload_optimizer and replicas == 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices decay, vectors (norms) do not."""
    # Under ZeRO-3 a parameter's own shape is a placeholder.
    dimensions = {p: len(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    return [
        {"params": [p for p, n in dimensions.items() if n > 1], "weight_decay": weight_decay},
        {"params": [p for p, n in dimensions.items() if n <= 1], "weight_decay": 0.0},
    ]


@dataclasses.dataclass(frozen=True)
class GradientPiece:
    """A rank's part of a parameter's gradient: the elements from `start` on of the flattened tensor of `shape`."""

    name: str
    shape: torch.Size  # of this tensor rank's part
    start: int
    values: Tensor  # (elements,)
    shared: bool = False  # the other tensor ranks have the same piece


class Observer(Protocol):
    """Who looks at a step while it is taken, and changes nothing."""

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Be entered around each forward pass."""

    def backward(self, pieces: Iterator[GradientPiece]) -> None:
        """Be given the gradient of the whole batch, before it is clipped."""


class Engine:
    """The model, its optimizer and ZeRO. `train_step` is one optimizer step; `evaluate` gives a loss."""

    def __init__(
        self,
        config: Config,
        batch: Batch,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        document_start: int | None,
        mesh: Mesh = Mesh(),
    ) -> None:
        deepspeed = import_deepspeed()
        self.config, self.batch, self.device, self.dtype, self.mesh = config, batch, device, dtype, mesh
        # The groups that DeepSpeed makes for itself are right as long as no matrix is shared.
        mpu = ModelParallelUnit(mesh) if mesh.tensor.size > 1 else None
        settings = deepspeed_config(config, batch, dtype)
        partitioned = config.zero.stage == 3
        with _whole_model(deepspeed, settings, partitioned, mesh, mpu):
            self.module = Decoder(shape, config.model, attention, document_start, mesh)
        gather = (lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0)) if partitioned else _as_it_is
        initialise(self.module, shape, config.seed, config.model.init_std, gather)
        if not partitioned:
            self.module.to(device)
        optim = config.optim
        groups, betas = parameter_groups(self.module, optim.weight_decay), (optim.beta1, optim.beta2)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )
        if _alone(config, batch):
            self.deepspeed.enable_backward_allreduce = False  # three passes over all gradients, to add up one summand
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.stage = settings["zero_optimization"]["stage"]

    def train_step(
        self, tokens: Tensor, rate: float, observer: Observer | None = None
    ) -> tuple[Tensor, Tensor | float, bool]:
        """Take one optimizer step.

        Args:
            tokens: (sequences of this data rank, S + 1) int64 on the device.
            rate: the share of the peak learning rate.
            observer: who looks at this step.

        Returns:
            The mean loss of this rank's tokens (a detached fp32 scalar on the device), the whole model's gradient norm before
            clipping, and whether the step was applied: one with a gradient that is not finite is skipped on every rank.
        """
        for group, peak in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = peak * rate
        skipped, norm, total = self.deepspeed.skipped_steps, None, torch.zeros((), device=self.device)
        for micro in tokens.split(self.batch.micro_batch):
            with observer.forward() if observer else contextlib.nullcontext():
                objective, nats = self.deepspeed(self._own(micro[:, :-1]), self._own(micro[:, 1:]))
            self.deepspeed.backward(objective)
            total += nats
            if observer and self.deepspeed.is_gradient_accumulation_boundary():
                observer.backward(self._gradient_pieces())
            if self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm = self._norm_without_zero()
            self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            applied = self.deepspeed.skipped_steps == skipped
        else:
            applied = bool(torch.isfinite(norm))
        return total / self.batch.accumulation, norm, applied

    def _norm_without_zero(self) -> Tensor:
        """Stage 0 in fp32 neither reports the norm nor skips a step that is not finite: both are made good, then it clips."""
        parameters = list(self.module.parameters())
        axis = self.mesh.tensor
        squares = torch.zeros((), device=self.device)
        for cut in (True, False):  # what every tensor rank has counts once
            gradients = [p.grad for p in parameters if p.grad is not None and (cut_of(p) is not None) == cut]
            if cut or axis.rank == 0:
                squares += torch.nn.utils.get_total_norm(gradients).square()
        if axis.size > 1:
            dist.all_reduce(squares, group=axis.group)
        norm = squares.sqrt()
        if not torch.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves a parameter without a gradient alone
        elif self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
        return norm

    def _gradient_pieces(self) -> Iterator[GradientPiece]:
        """Yield this rank's share of the whole batch's gradient, which exists between backward and step.

        The pieces of all replicas together are the gradient of every parameter of their tensor rank, once.
        """
        from deepspeed.utils import safe_get_local_grad

        rank, world = self.mesh.replicas.rank, self.mesh.replicas.size
        for name, parameter in self.module.named_parameters():
            shared = cut_of(parameter) is None
            if self.stage == 0:  # every rank has it all
                size = -(-parameter.numel() // world)
                start = min(rank * size, parameter.numel())
                values = parameter.grad.flatten()[start : start + size]
                yield GradientPiece(name, parameter.shape, start, values, shared)
            elif self.stage == 3:
                part = safe_get_local_grad(parameter)
                start = min(rank * part.numel(), parameter.ds_numel)
                values = part.flatten()[: parameter.ds_numel - start]
                yield GradientPiece(name, parameter.ds_shape, start, values, shared)
            elif (mapping := parameter._hp_mapping) is not None:
                part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                if part.numel() > size:  # stage 1 in bf16 with accumulation keeps the whole sum on every rank
                    part = part[start : start + size]
                yield GradientPiece(name, parameter.shape, start, part, shared)

    def _own(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S / C): what this context rank takes of each sequence."""
        return tokens.chunk(self.mesh.context.size, 1)[self.mesh.context.rank].contiguous()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss (fp32 scalar) of this rank's part of targets (B, S), and how many targets that is.

        Where a target is -100 it is left out.
        """
        self.deepspeed.eval()
        inputs, targets = self._own(inputs), self._own(targets)
        _, nats = self.deepspeed(inputs, targets)
        self.deepspeed.train()
        valid = (targets != IGNORED).sum()
        return nats * valid, valid

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return logits (B, S, V) of the newest tokens (B, S); every rank must call it together."""
        self.deepspeed.eval()
        result = self.deepspeed(tokens, None, cache)
        self.deepspeed.train()
        return result


def import_deepspeed() -> Any:
    """Import DeepSpeed so that nothing is compiled at start-up, and its logger writes where stdout points now."""
    import deepspeed
    import deepspeed.ops

    # On a CPU `init_distributed` would build this op with a C++ compiler (20 to 40 s); only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        return deepspeed
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def send_deepspeed_log_to(path: os.PathLike[str]) -> None:
    """Let DeepSpeed's logger write to a file, and never to the console."""
    logger = logging.getLogger("DeepSpeed")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(logging.FileHandler(path))


@contextlib.contextmanager
def _as_it_is(_: nn.Parameter) -> Iterator[None]:
    yield


def _whole_model(
    deepspeed: Any, settings: dict[str, Any], partitioned: bool, mesh: Mesh, mpu: ModelParallelUnit | None
) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3 parameters are partitioned as they are made: no rank ever holds the whole model."""
    if not partitioned:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(data_parallel_group=mesh.replicas.group, config_dict_or_path=settings, mpu=mpu)
