"""Check that the values of a configuration are valid and fit together, before a process group exists.

`conf/schema.py` defines the keys. What depends on the machine (a GPU, an installed package) is checked where it is needed.
`conf/identity.py` says which values a run that goes on may change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from conf.arms import Arm, check_groups, layer_arms, width_of
from conf.load import flatten, to_dict
from conf.optimizers import OPTIMIZERS
from conf.overrides import TEXT_LISTS
from conf.schema import Config, DataConfig
from conf.urls import PLACE_OF_TEXT, refuse_secrets_in
from kernels.common.errors import UserError, unknown
from kernels.formula import FormulaError
from kernels.formula.domains import check_domains

_CHOICES = {
    "ffn.save": ("packed", "output", "everything", "input"),
    "ffn.init_match": ("std", "rms"),
    "ffn.backend": ("auto", "reference", "c", "triton"),
    "model.activation_checkpointing": ("false", "attention", "selective", "true"),
    "model.attention": ("auto", "flash", "sdpa", "flex", "blocks"),
    "optim.name": OPTIMIZERS,
    "optim.update_scale": ("rms", "spectral"),
    "optim.ns_coefficients": ("quintic", "polar_express"),
    "optim.ns_dtype": ("auto", "bf16", "fp32"),
    "resume_optimizer": ("keep", "fresh"),
    "schedule.name": ("cosine", "linear", "wsd"),
    "precision.name": ("auto", "bf16", "fp32", "fp8"),
    "precision.emulate": ("none", "fp8", "mxfp8", "nvfp4"),
    "precision.scaling": ("rowwise", "tensorwise"),
    "precision.reduce": ("fp32", "bf16"),
    "guard.spike": ("report", "skip", "rewind"),
    "tokenizer.kind": ("sentencepiece", "huggingface"),
    "data.held_out_by": ("document", "folder"),
    "optim.scaling": ("none", "mup"),
    "data.source": ("stdlib", "installed", "text", "jsonl", "parquet", "hf", "blend"),
}
_POSITIVE = (
    "sequence_length",
    "global_batch_size",
    "keep_last",
    "log_every",
    "sample_tokens",
    "telemetry_window",
    "model.d_model",
    "model.n_layers",
    "model.n_heads",
    "model.d_ff_gated",
    "model.rope_theta",
    "model.norm_eps",
    "optim.lr",
    "optim.eps",
    "optim.ns_steps",
    "guard.skip_limit",
    "guard.spike_sigmas",
    "guard.spike_window",
    "zero.bucket_elements",
    "parallel.timeout_minutes",
    "parallel.tensor",
    "parallel.context",
    "watchdog.phase_minutes",
    "tokenizer.train_megabytes",
    "data.shard_megabytes",
    "data.held_out_kib",
    "data.max_epochs",
    "tokenizer.vocab_size",
)
_POSITIVE_OR_NULL = (
    "steps",
    "tokens",
    "micro_batch_size",
    "eval_tokens",
    "model.n_kv_heads",
    "model.head_dim",
    "model.d_ff",
    "model.vocab_size",
    "model.init_std",
    "optim.adamw_lr",
)
_NOT_NEGATIVE = (
    "eval_every",
    "save_every",
    "sample_every",
    "log_seconds",
    "telemetry_every",
    "model.z_loss",
    "model.logit_softcap",
    "optim.weight_decay",
    "optim.clip",
    "data.workers",
    "data.held_out_files",
    "guard.replicas",
    "guard.repeat",
    "optim.adamw_weight_decay",
    "optim.qk_clip",
    "watchdog.minutes",
)
_LARGEST = 2**63 - 1
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255
_FRACTIONS = ("schedule.warmup", "schedule.final", "schedule.decay", "optim.beta1", "optim.beta2", "optim.momentum")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Batch sizes and length of a run: `global_batch = micro_batch x data_parallel x accumulation`."""

    micro_batch: int  # sequences
    global_batch: int  # sequences
    data_parallel: int  # world size / (tensor x context)
    accumulation: int  # micro-batches per rank and step
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step


def validate(config: Config, world_size: int) -> Batch:
    """Refuse a configuration that cannot train on `world_size` ranks, and return its batch sizes.

    Raises:
        UserError: the first rule that is broken, with the values that break it.
    """
    values = flatten(to_dict(config))
    _check_values(values)
    _check_formulas(config)
    _check_model(config)
    _check_optimizer(config)
    _check_parallel(config, world_size)
    return _check_batch(config, world_size)


def trains_in_bf16(precision: str, stage: int, has_bf16: bool) -> bool:
    """Return whether a run trains in bf16, else in fp32.

    Args:
        precision: `precision.name`. auto is bf16 where DeepSpeed computes right in it, which it does not at stage 0.
        stage: of ZeRO.
        has_bf16: whether the hardware multiplies bf16.
    """
    return (has_bf16 and stage > 0) if precision == "auto" else precision != "fp32"


def holds_text_out(data: DataConfig) -> bool:
    """Return whether a corpus, or a part of a blend, holds text out for evaluation."""
    if data.source != "blend" or not isinstance(data.parts, dict):
        return data.held_out > 0
    parts = [part for part in data.parts.values() if isinstance(part, dict)]
    return any(part.get("held_out", data.held_out) for part in parts)


def check_ranges(values: Mapping[str, Any], corpus: str = "data") -> None:
    """Refuse values that are none of a key's choices, or out of its range. `values` need not hold all keys.

    Args:
        corpus: what stands for `data` in the errors: `data.parts.NAME` where the values are those of a part of a blend.

    Raises:
        UserError: the first rule that is broken.
    """

    def shown(name: str) -> str:
        return corpus + name.removeprefix("data") if name.startswith("data.") else name

    given = values.keys()
    for name, allowed in ((name, _CHOICES[name]) for name in _CHOICES if name in given):
        value = str(values[name]).lower() if isinstance(values[name], bool) else values[name]
        if value not in allowed and "," in str(value):
            raise UserError(f"{shown(name)}={value} has several values but takes one; --multirun sweeps")
        if value not in allowed:
            raise unknown(shown(name), str(value), allowed)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown(name)}={value} is not a finite number")
        if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            raise UserError(f"{shown(name)} is beyond 64-bit arithmetic")
    for name in filter(given.__contains__, _POSITIVE):
        if not values[name] > 0:
            raise UserError(f"{shown(name)}={values[name]} must be positive")
    for name in filter(given.__contains__, _POSITIVE_OR_NULL):
        if values[name] is not None and not values[name] > 0:
            raise UserError(f"{shown(name)}={values[name]} must be positive, or null")
    for name in filter(given.__contains__, _NOT_NEGATIVE):
        if values[name] is not None and values[name] < 0:
            raise UserError(f"{shown(name)}={values[name]} must not be negative")
    for name in filter(given.__contains__, _FRACTIONS):
        if not 0 <= values[name] <= 1:
            raise UserError(f"{shown(name)}={values[name]} must lie between 0 and 1")
    if not 0 <= values.get("data.held_out", 0) <= 0.5:
        raise UserError(
            f"{corpus}.held_out={values['data.held_out']} must be a fraction of at most 0.5; 0 trains without evaluation"
        )


def _check_values(values: dict[str, Any]) -> None:
    check_ranges(values)
    if values["run"] in (None, "", ".", "..") or any(character in values["run"] for character in "/\0"):
        raise UserError(
            f"run={values['run']!r} cannot name a folder inside {values['runs']}/: leave out '/' (runs=FOLDER moves it)"
        )
    if values["run"] == "wandb":
        raise UserError(f"run=wandb: {values['runs']}/wandb holds the files of W&B; give this run another name")
    if len(values["run"].encode(errors="surrogatepass")) > LONGEST_NAME:
        raise UserError(f"run={values['run'][:20]}... has more than {LONGEST_NAME} bytes: no folder can have that name")
    for name in TEXT_LISTS:
        texts = values.get(name, "{...}")  # a dictionary, whose keys have been flattened
        if texts is None and name == "prompts":
            continue
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{name}={texts} must be a list of texts, such as \"{name}=['one','two']\"")
    refuse_secrets_in((name, value) for name, value in values.items() if PLACE_OF_TEXT.fullmatch(name))
    if values["data.source"] not in ("stdlib", "installed", "blend") and not values["data.path"]:
        raise UserError(
            f"data={values['data.source']} needs the location of the text: add data.path=FILE, FOLDER or GLOB"
        )
    if values["data.source"] == "blend" and not any(name.startswith("data.parts.") for name in values):
        raise UserError(
            "data=blend needs its parts: add data.parts.NAME.path=... for each, and data.parts.NAME.weight=..."
        )
    if values["tokenizer.kind"] == "huggingface" and not values["tokenizer.path"]:
        raise UserError("tokenizer=huggingface needs tokenizer.path=tokenizer.json")


def _check_formulas(config: Config) -> None:
    checked: list[Arm] = []
    for index, arm in enumerate(layer_arms(config)):
        if any(arm is other for other in checked):
            continue
        checked.append(arm)
        ffn = arm.config
        if ffn.init_scale is not None and not 0 <= ffn.init_scale < math.inf:
            raise UserError(f"ffn.init_scale={ffn.init_scale} must be a finite number that is not negative")
        try:
            check_domains(arm.formula)
        except FormulaError as error:
            changed = ffn != dataclasses.replace(config.ffn, per_layer={})
            key = f"the arm of layer {index}" if changed else "ffn.formula"
            raise UserError(f"{key} is refused: {error}") from error
        check_groups(arm.formula, width_of(arm.formula, config.model), config.parallel.tensor, ffn.name)
        if ffn.save == "output" and not ffn.from_output:
            raise UserError(
                f"ffn.save=output needs the derivative of ffn={ffn.name} as a formula of the output h (ffn.from_output), "
                "and none is given; ffn.save=packed keeps as little for ungated arms"
            )


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.d_model % model.n_heads:
        raise UserError(
            f"model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}: "
            "change one of them, or set model.head_dim"
        )
    if config.optim.scaling == "mup" and model.tie_embeddings:
        raise UserError(
            "optim.scaling=mup gives the embedding and the output projection other rates and scales, and with "
            "model.tie_embeddings=true they are one matrix: set it to false"
        )
    if config.optim.base_width < 1 or config.optim.base_layers < 1:
        raise UserError("optim.base_width and optim.base_layers are the shape of a model: at least 1")
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        raise UserError(f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}")
    if (model.head_dim or model.d_model // model.n_heads) % 2:
        raise UserError(
            "rotary embeddings rotate pairs of channels: the head dimension (d_model / n_heads) must be even"
        )


def _check_optimizer(config: Config) -> None:
    zero, schedule = config.zero, config.schedule
    OPTIMIZERS[config.optim.name].check(config)
    if zero.stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={zero.stage}: ZeRO has the stages 0, 1, 2 and 3")
    if zero.stage == 0 and config.precision.name in ("bf16", "fp8"):
        raise UserError(
            f"zero=0 with precision={config.precision.name} is incorrect in DeepSpeed (a step on zero gradients at startup "
            "applies weight decay once): use zero=1, which is exact, or precision=fp32"
        )
    if zero.offload_parameters and zero.stage != 3:
        raise UserError("zero.offload_parameters=true needs zero=3: only stage 3 partitions parameters")
    if zero.offload_optimizer and zero.stage == 0:
        raise UserError("zero.offload_optimizer=true needs zero=1, 2 or 3: stage 0 does not partition the optimizer")
    if config.guard.spike == "skip" and zero.offload_optimizer:
        raise UserError(
            "guard.spike=skip needs the gradient on the device before the optimizer takes it, and zero.offload_optimizer=true "
            "keeps it in CPU memory: use guard.spike=report or rewind"
        )
    if config.guard.replicas and zero.stage == 3:
        raise UserError(
            "guard.replicas has nothing to compare under zero=3: no two ranks hold the same weights; use zero=2"
        )
    if config.guard.repeat and not config.deterministic:
        raise UserError("guard.repeat compares bit for bit, which needs deterministic=true")
    if config.guard.spike == "rewind" and not config.save_every:
        raise UserError("guard.spike=rewind goes back to a checkpoint, and save_every=0 saves none: set save_every=N")
    if schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        raise UserError(
            f"schedule.warmup={schedule.warmup} and schedule.decay={schedule.decay} take more than the whole run"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    """Check what needs no shape; `conf.shape.check_divisibility` checks heads, widths and vocabulary."""
    tensor, context, length = config.parallel.tensor, config.parallel.context, config.sequence_length
    if world_size < tensor * context:
        one = " ".join(
            f"{key}=1" for key, size in (("parallel.tensor", tensor), ("parallel.context", context)) if size > 1
        )
        raise UserError(
            f"parallel.tensor={tensor} x parallel.context={context} needs {tensor * context} ranks, and this run has "
            f"{world_size}: start it as deepspeed --num_gpus {tensor * context} train.py ... (or by torchrun or srun), "
            f"or set {one}"
        )
    if world_size % (tensor * context):
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"parallel.tensor={tensor} x parallel.context={context} does not divide the {world_size} rank(s) of this run: "
            f"their product must be one of {', '.join(map(str, divisors))}"
        )
    if length % context:
        raise UserError(f"parallel.context={context} does not divide sequence_length={length}")
    if config.parallel.sequence and length // context % tensor:
        raise UserError(
            f"parallel.sequence=true: parallel.tensor={tensor} does not divide the {length // context} tokens of a sequence "
            "per context rank"
        )


def _check_batch(config: Config, world_size: int) -> Batch:
    total = config.global_batch_size
    world_size //= config.parallel.tensor * config.parallel.context
    if total % world_size:
        raise UserError(f"global_batch_size={total} is not divisible by the {world_size} data-parallel ranks")
    per_rank = total // world_size
    micro = config.micro_batch_size or per_rank
    if per_rank % micro:
        raise UserError(
            f"global_batch_size={total} over {world_size} data-parallel rank(s) is {per_rank} sequences per rank, which "
            f"micro_batch_size={micro} does not divide"
        )
    per_step = total * config.sequence_length
    steps = total_steps(config)
    if steps is None:
        raise UserError("the length of the run is missing: steps=N, or tokens=N")
    if steps < 1:
        raise UserError(f"tokens={config.tokens} is less than one step of {per_step} tokens")
    return Batch(micro, total, world_size, per_rank // micro, steps, per_step)


def total_steps(config: Config) -> int | None:
    """Return the length of a run in steps; None: it is not set."""
    if config.steps is not None or config.tokens is None:
        return config.steps
    return config.tokens // (config.global_batch_size * config.sequence_length)
