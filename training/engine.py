"""The DeepSpeed engine: built from the configuration, with the few corrections that DeepSpeed needs.

The DeepSpeed configuration is built here and nowhere else. DeepSpeed defaults that would silently change training (clipping
at 1.0, gradients reduced in bf16) are always set explicitly. tests/training/test_deepspeed_contract.py covers every private
name that is used, so that an upgrade fails loudly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import Config, ParallelConfig
from conf.shape import Shape
from conf.validate import Batch
from data.batches import IGNORED
from launch.estimate.counts import GATHERED_BUCKETS, overlaps
from model.decoder import Cache, Decoder
from model.initialise import initialise
from model.parallel import Mesh, init_mesh, shard_spec
from model.products import products_of
from model.scaling import scaling_of
from training.culprit import DroppedGradient
from training.mpu import ModelParallelUnit
from training.optimizers import UPDATES, MatrixOptimizer
from training.optimizers.groups import parameter_groups
from training.optimizers.qk_clip import QKClip
from training.profiler import part
from training.zero import fragment_mapping, index_in_group, partition_range, spoil_gradient, stage_3_parameter


def mesh_from_config(parallel: ParallelConfig) -> Mesh:
    """Return the mesh that the configuration describes, and create its process groups. Collective."""
    return init_mesh(parallel.tensor, parallel.context, parallel.sequence)


def deepspeed_config(config: Config, batch: Batch, dtype: torch.dtype, on_gpu: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's configuration as the dictionary that `deepspeed.initialize` takes.

    To DeepSpeed a context rank is another data-parallel rank: its micro-batch consists of parts of sequences, and the gradient
    is the mean over all ranks.
    """
    zero, bf16 = config.zero, dtype == torch.bfloat16
    # With nothing to partition, stage 1 equals stage 0, which DeepSpeed runs in half the time. For bf16 see below.
    stage = 0 if _nothing_to_partition(config, batch) and not bf16 else zero.stage
    result: dict[str, Any] = {
        "train_batch_size": batch.global_batch * config.parallel.context,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        # Set even if it is 0: DeepSpeed's default is 1.0. `_clip_at_stage_0` clips stage 0.
        "gradient_clipping": config.optim.clip if stage else 0.0,
        # With accumulation, bf16 gradients are freed as soon as they are summed. For a single micro-batch it is slower.
        "bf16": {"enabled": bf16, "immediate_grad_update": batch.accumulation > 1},
        "communication_data_type": config.precision.reduce if bf16 else "fp32",
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW: nothing is compiled
        "zero_allow_untested_optimizer": config.optim.name != "adamw",
        "zero_optimization": _zero_config(config, stage, overlaps(config.zero, on_gpu)),
        # Nobody reads it, and on a GPU it would wait for the device twice per micro-batch.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if bf16 and (batch.accumulation > 1 or _nothing_to_partition(config, batch)):
        # Sum micro-batches in fp32: a long bf16 sum loses its small terms. And with nothing to partition, a step of DeepSpeed's
        # optimizer with fp32 sums takes half as long as a step of the one that partitions.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _zero_config(config: Config, stage: int, overlap: bool) -> dict[str, Any]:
    zero = config.zero
    result: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": zero.bucket_elements,
        "allgather_bucket_size": zero.bucket_elements,
        "overlap_comm": overlap,
        "contiguous_gradients": True,
    }
    if zero.offload_optimizer:
        result["offload_optimizer"] = {"device": "cpu"}
    if zero.stage == 3:
        result |= {
            "stage3_prefetch_bucket_size": zero.bucket_elements,
            "stage3_max_live_parameters": GATHERED_BUCKETS * zero.bucket_elements,
            "stage3_max_reuse_distance": GATHERED_BUCKETS * zero.bucket_elements,
            "stage3_param_persistence_threshold": min(100_000, zero.bucket_elements),
            "sub_group_size": 10**9,
        }
        if zero.offload_parameters:
            result["offload_param"] = {"device": "cpu"}
    return result


def _nothing_to_partition(config: Config, batch: Batch) -> bool:
    """Whether stage 1 has a single data x context rank, and so nothing to partition."""
    zero, data_context_ranks = config.zero, batch.data_parallel * config.parallel.context
    return zero.stage == 1 and not zero.offload_optimizer and data_context_ranks == 1


@dataclasses.dataclass(frozen=True)
class GradientFragment:
    """The elements of a parameter's gradient that a rank holds: from `start` on, of the flattened tensor of `shape`."""

    name: str
    shape: torch.Size  # of this tensor rank's shard
    start: int
    values: Tensor  # (elements,)
    replicated: bool = False  # every tensor rank holds the same fragment


class Observer(Protocol):
    """Watches a step without changing it."""

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that is entered around each forward pass."""
        ...

    def backward(self, fragments: Iterator[GradientFragment]) -> None:
        """Receive the gradient of the whole batch, before it is clipped."""


class Engine:
    """The model, its optimizer and ZeRO. `train_step` takes one optimizer step; `evaluate` returns a loss."""

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
        # Without tensor ranks the groups that DeepSpeed creates by itself are right.
        mpu = ModelParallelUnit(mesh) if mesh.tensor.size > 1 else None
        settings = deepspeed_config(config, batch, dtype, device.type == "cuda")
        partitioned = config.zero.stage == 3
        with zero_init_context(deepspeed, settings, partitioned, mesh, mpu):
            products, _ = products_of(config.precision, device)
            self.module = Decoder(shape, config.model, attention, document_start, mesh, products)

        def gather(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
            """Return a context in which rank 0 may write the whole parameter."""
            if not partitioned:
                return contextlib.nullcontext()
            return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

        scaling = scaling_of(config.optim, shape)
        initialise(self.module, shape, config.seed, config.model.init_std, scaling, gather)
        if not partitioned:
            self.module.to(device)
        optimizer = UPDATES[config.optim.name](parameter_groups(self.module, config.optim, scaling), config.optim)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )
        if _nothing_to_partition(config, batch):
            # DeepSpeed would pass over all gradients three times to reduce them over one rank.
            self.deepspeed.enable_backward_allreduce = False
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.stage = settings["zero_optimization"]["stage"]
        self.matrix_optimizer = optimizer if isinstance(optimizer, MatrixOptimizer) else None
        if self.matrix_optimizer:
            from training.fragments import layout_of  # imports DeepSpeed

            self.matrix_optimizer.attach(layout_of(self))
        limit = config.optim.qk_clip
        self.qk_clip = QKClip(self.module, limit, mesh, device) if self.matrix_optimizer and limit else None
        self.dropped = DroppedGradient(self)  # the gradient of the last step that was skipped

    def train_step(
        self,
        tokens: Tensor,
        lr_scale: float,
        observer: Observer | None = None,
        refuse: Callable[[float, float], bool] | None = None,
    ) -> tuple[Tensor, Tensor | float, bool]:
        """Take one optimizer step.

        Args:
            tokens: (sequences of this data rank, S + 1) int64 on the device.
            lr_scale: factor on the peak learning rate.
            observer: watches this step.
            refuse: takes the loss and the gradient norm, the same on every rank, and returns whether to leave the step out.
                Under ZeRO the norm takes one more pass over the gradient.

        Returns:
            The mean loss of this rank's tokens (a detached fp32 scalar on the device), the whole model's gradient norm before
            clipping, and whether the step was applied. A step with a non-finite gradient is skipped on every rank; its norm is
            NaN where the gradient holds one, else infinite.
        """
        self.dropped.found = None
        if self.qk_clip:
            self.qk_clip.reset()
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak_lr * lr_scale
        refused: float | None = None  # the norm of a gradient that was left out
        skipped_before, norm, total = self.deepspeed.skipped_steps, None, torch.zeros((), device=self.device)
        for micro_batch in tokens.split(self.batch.micro_batch):  # (micro-batch, S + 1)
            inputs, targets = self.context_shard(micro_batch[:, :-1]), self.context_shard(micro_batch[:, 1:])
            with observer.forward() if observer else contextlib.nullcontext():
                objective, nats, _ = self.deepspeed(inputs, targets)
            self.deepspeed.backward(objective)
            total += nats
            if observer and self.deepspeed.is_gradient_accumulation_boundary():
                observer.backward(self.gradient_fragments())
            if refuse and self.deepspeed.is_gradient_accumulation_boundary():
                refused = self._refused(total / self.batch.accumulation, refuse)
            if self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm = self._clip_at_stage_0()
            if self.qk_clip and self.matrix_optimizer and self.deepspeed.is_gradient_accumulation_boundary():
                self.matrix_optimizer.row_factors = self.qk_clip.row_factors()
            with part("optimizer"):
                self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            applied = self.deepspeed.skipped_steps == skipped_before
            norm = norm if applied else self.dropped.norm()
        else:
            applied = bool(torch.isfinite(norm))
        norm = norm if refused is None else refused
        return total / self.batch.accumulation, norm, applied

    def _refused(self, loss: Tensor, refuse: Callable[[float, float], bool]) -> float | None:
        """Make the gradient infinite, so that the step is skipped, if `refuse` says so; return its norm then. Collective.

        Args:
            loss: of this rank.
        """
        sums = torch.zeros(2, device=self.device)
        sums[0] = loss / dist.get_world_size()
        for fragment in self.gradient_fragments():
            if not fragment.replicated or self.mesh.tensor.rank == 0:  # what every tensor rank holds counts once
                sums[1] += fragment.values.float().square().sum()
        dist.all_reduce(sums)
        mean, norm = float(sums[0]), float(sums[1].sqrt())
        if not refuse(mean, norm):
            return None
        for parameter in self.module.parameters():
            spoil_gradient(self.stage, parameter, self.mesh.data_context.rank)
        return norm

    def _clip_at_stage_0(self) -> Tensor:
        """Clip the gradient and return its norm before clipping; drop a gradient that is not finite, so the step is skipped.

        Stage 0 in fp32 neither reports the norm nor skips a non-finite step.
        """
        parameters = list(self.module.parameters())
        axis = self.mesh.tensor
        squares = torch.zeros((), device=self.device)
        for sharded in (True, False):
            gradients = [p.grad for p in parameters if p.grad is not None and (shard_spec(p) is not None) == sharded]
            if sharded or axis.rank == 0:  # a parameter that every tensor rank holds counts once
                squares += torch.nn.utils.get_total_norm(gradients).square()
        if axis.size > 1:
            dist.all_reduce(squares, group=axis.group)
        norm = squares.sqrt()
        if not torch.isfinite(norm):
            self.dropped.scan()
            for parameter in parameters:
                parameter.grad = None  # AdamW does not change a parameter without a gradient
        elif self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
        return norm

    def gradient_fragments(self) -> Iterator[GradientFragment]:
        """Yield this rank's fragments of the whole batch's gradient, which exists between backward and step.

        The fragments of all data x context ranks together are the gradient of every parameter of their tensor rank, once.
        """
        from deepspeed.utils import safe_get_local_grad

        rank, world = self.mesh.data_context.rank, self.mesh.data_context.size
        for name, parameter in self.module.named_parameters():
            replicated = shard_spec(parameter) is None
            if self.stage == 0:  # every rank holds the whole gradient and yields one of `world` equal ranges
                assert parameter.grad is not None, f"{name} has no gradient between backward and step"
                size = -(-parameter.numel() // world)
                start = min(rank * size, parameter.numel())
                values = parameter.grad.flatten()[start : start + size]
                yield GradientFragment(name, parameter.shape, start, values, replicated)
            elif self.stage == 3:
                start, size = partition_range(parameter, rank)
                values = safe_get_local_grad(parameter).flatten()[:size]
                yield GradientFragment(name, stage_3_parameter(parameter).ds_shape, start, values, replicated)
            elif (mapping := fragment_mapping(parameter)) is not None:
                values = mapping.get_lp_grad_fragment(index_in_group(parameter)).flatten()
                start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                if values.numel() > size:  # stage 1 in bf16 with accumulation keeps the whole sum on every rank
                    values = values[start : start + size]
                yield GradientFragment(name, parameter.shape, start, values, replicated)

    def watch_gradients(self, tokens: Tensor, see: Callable[[str, Tensor], None]) -> Tensor:
        """Compute what a step minimises and its gradient, past DeepSpeed: nothing is accumulated, reduced or kept. Collective.

        Args:
            tokens: (B, S + 1) of a micro-batch.
            see: receives each parameter's name and its gradient before any reduction, in the order of backward.

        Returns:
            The objective, a scalar.
        """

        def watch(name: str) -> Callable[[Tensor], Tensor]:
            def hook(gradient: Tensor) -> Tensor:
                see(name, gradient)
                return gradient.new_zeros(()).expand_as(gradient)  # keep no gradient

            return hook

        self.module.train()
        parameters = dict(self.module.named_parameters())
        handles = [parameter.register_hook(watch(name)) for name, parameter in parameters.items()]
        objective, *_ = self.module(self.context_shard(tokens[:, :-1]), self.context_shard(tokens[:, 1:]))
        torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
        for handle in handles:
            handle.remove()
        return objective

    def context_shard(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S / C): this context rank's part of each sequence."""
        return tokens.chunk(self.mesh.context.size, 1)[self.mesh.context.rank].contiguous()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss of this rank's part of targets (B, S), how many there are, and the loss of each.

        Targets of -100 are ignored: they do not count, and have the loss 0. Losses are in nats, fp32: a scalar, and (B, S / C).
        """
        self.deepspeed.eval()
        inputs, targets = self.context_shard(inputs), self.context_shard(targets)
        _, nats, token_nats = self.deepspeed(inputs, targets)
        self.deepspeed.train()
        valid = (targets != IGNORED).sum()
        return nats * valid, valid, token_nats

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return logits (B, S, V) of the newest tokens (B, S). Collective."""
        self.deepspeed.eval()
        result = self.deepspeed(tokens, None, cache)
        self.deepspeed.train()
        return result


def import_deepspeed() -> Any:
    """Import DeepSpeed without compiling anything, and initialise its communication if torch's is initialised."""
    import deepspeed
    import deepspeed.ops

    _import_muon()
    # On a CPU `init_distributed` would build this op with a C++ compiler (20 to 40 s); only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which its ZeRO optimizers ask for, without the decorators that load Inductor: no run uses it."""
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # it is of some versions
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiled


def redirect_deepspeed_log(path: os.PathLike[str]) -> None:
    """Make DeepSpeed's logger write to a file, and not to the console."""
    logger = logging.getLogger("DeepSpeed")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(logging.FileHandler(path))


def zero_init_context(
    deepspeed: Any, settings: dict[str, Any], partitioned: bool, mesh: Mesh, mpu: ModelParallelUnit | None
) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the model is constructed.

    Under ZeRO-3 each parameter is partitioned as soon as it exists, so no rank ever holds the whole model.
    """
    if not partitioned:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(data_parallel_group=mesh.data_context.group, config_dict_or_path=settings, mpu=mpu)
