"""The typed schema: every key of `train.py` with its type, its default and one line of help.

This module is the one place that defines what a key means; `train.py --help` prints these lines. Values of a group's choices
are in `conf/<group>/<choice>.yaml`. `conf/load.py` reads the command line; `conf/validate.py` checks that values fit together.
The keys of plans and of clusters, which other commands read, are in `ablation_schema.py` and `cluster_schema.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


def key(default: Any, help: str, only: str = "") -> Any:
    """Return a dataclass field with a default and its line of help.

    Args:
        only: the condition under which the key has an effect: "schedule.name=wsd", "data.source=jsonl|parquet",
            "zero.stage!=0", or "parallel.tensor>1" (of a list: its length); or two with " or " between them. Typed where it
            does not hold, the key is refused (conf/effects.py).
    """
    metadata = {"help": help, "only": only}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class FFNConfig:
    """`ffn=`: the feed-forward arm, given by its formula."""

    name: str = key("swiglu", "name of the arm, used in the name of the run")
    formula: str = key(
        "silu(gate) * up",
        "formula of x (ungated, 2 matrices), or of gate and up (gated, 3 matrices)",
        only="ffn.name=custom",
    )
    parameters: Any = key(
        {},
        "parameters of the formula: a number is fixed, {init: 0.25, share: layer | channel | group, groups: 8} is learned, "
        "{schedule: linear | cosine, from: 0, to: 1, start: 0, steps: 500} follows the step",
    )
    from_output: str = key(
        "", "the derivative as a formula of the output h, if there is one: for save=output", only="ffn.name=custom"
    )
    save: str = key(
        "packed",
        "saved for backward beside the layer's input: packed (pre-activations) | output | everything | input",
        only="model.activation_checkpointing!=selective",
    )
    init_scale: Optional[float] = key(
        None,
        "scale of the initial down projection; null: chosen so that the arm starts with the output scale of swiglu",
    )
    init_match: str = key(
        "std",
        "what of h that scale makes equal, for normal pre-activations: std | rms (with the mean, as up to version 0.2)",
        only="ffn.init_scale=null",
    )
    per_layer: Any = key(
        {}, "other arms for some layers: {0: relu2, layers_4_7: {arm: geglu}, last: {parameters: {limit: 5}}}"
    )
    backend: str = key("auto", "kernel backend: auto | reference | c | triton")


@dataclass
class ModelConfig:
    """`model=`: the decoder's shape."""

    name: str = key("nano", "name of the preset, used in the name of the run")
    d_model: int = key(256, "width of the residual stream")
    n_layers: int = key(4, "decoder layers")
    n_heads: int = key(4, "query heads")
    n_kv_heads: Optional[int] = key(None, "key and value heads (grouped-query attention); null: as many as n_heads")
    head_dim: Optional[int] = key(None, "channels per head; null: d_model / n_heads")
    d_ff: Optional[int] = key(None, "FFN width; null: d_ff_gated for a gated arm, 3/2 of it for an ungated one")
    d_ff_gated: int = key(
        688, "FFN width of a gated arm (3 matrices); an ungated arm (2 matrices) gets 3/2 of it", only="model.d_ff=null"
    )
    vocab_size: Optional[int] = key(
        None, "rows of the embedding; null: the tokenizer's size, rounded up to a multiple of 64"
    )
    rope_theta: float = key(10000.0, "base of the rotary frequencies")
    norm_eps: float = key(1e-5, "epsilon of RMSNorm")
    qk_norm: bool = key(False, "RMSNorm on queries and keys, per head")
    tie_embeddings: bool = key(False, "the output projection is the embedding")
    init_std: Optional[float] = key(None, "standard deviation of the initial weights; null: 1 / sqrt(d_model)")
    z_loss: float = key(0.0, "coefficient of logsumexp(logits)^2, added to the training loss")
    logit_softcap: float = key(0.0, "c of the logits' c tanh(logits / c), as in Gemma 2; 0: none")
    attention: str = key("auto", "attention backend: auto | flash | sdpa | flex | blocks")
    mask_documents: bool = key(False, "attention does not cross the boundaries of packed documents")
    activation_checkpointing: Any = key(
        False,
        "recomputed in backward, for less memory: false | attention (and norms) | selective (the up projection too) | "
        "true (whole layers, about a third more time)",
    )


@dataclass
class DataConfig:
    """`data=`: the corpus."""

    name: str = key("stdlib", "name of the corpus, used in the name of the prepared folder")
    source: str = key("stdlib", "reader: stdlib | installed | text | jsonl | parquet | hf | blend")
    path: Any = key(
        None,
        "file, glob, folder or URL (s3://, gs://, https://, hf://, ...), or a list; .gz, .zst, .bz2, .xz are decompressed",
        only="data.source=text|jsonl|parquet|hf",
    )
    field: str = key("text", "jsonl, parquet, hf: the field with the text", only="data.source=jsonl|parquet|hf|blend")
    subset: Optional[str] = key(None, "hf: configuration of the data set", only="data.source=hf|blend")
    split: str = key("train", "hf: split of the data set", only="data.source=hf|blend")
    held_out: float = key(
        0.04,
        "fraction of the documents held out for evaluation, selected by a hash of their text; 0: train without evaluation",
    )
    held_out_files: int = key(
        0,
        "hold out so many documents instead (at most half), and train on none that nearly repeats one; 0: the fraction",
        only="data.held_out>0",
    )
    held_out_by: str = key(
        "document",
        "what is held out together: document | folder (of those in data.path; of stdlib and installed, a package)",
        only="data.held_out>0",
    )
    held_out_kib: int = key(
        2,
        "KiB of each held-out document that are scored, from a place that its hash chooses",
        only="data.held_out_files>0",
    )
    prepared: str = key("prepared", "folder of prepared corpora")
    max_epochs: float = key(
        4.0, "refuse a run that goes through the corpus, or a part of a blend, more often than this"
    )
    shard_megabytes: int = key(64, "most text per shard (MB), the unit of parallel work and of resuming")
    workers: int = key(0, "tokenizer processes; 0: one per core")
    parts: Any = key({}, "blend: {name: {weight: W, source: ..., path: ...}}", only="data.source=blend")


@dataclass
class TokenizerConfig:
    """`tokenizer=`: the tokenizer."""

    name: str = key("sentencepiece", "name of the choice")
    kind: str = key("sentencepiece", "sentencepiece | huggingface")
    path: Optional[str] = key(None, "a .model file or a tokenizer.json; null: train SentencePiece on the corpus")
    eos: Optional[str] = key(
        None,
        "the token that ends a document; null: as the files beside it say (eos_token), or by a common name",
        only="tokenizer.path!=null",
    )
    bos: Optional[str] = key(
        None,
        "a token that begins each document; null: none, a text starts after the end of another",
        only="tokenizer.path!=null",
    )
    vocab_size: int = key(4096, "vocabulary entries of a tokenizer trained here", only="tokenizer.path=null")
    train_megabytes: int = key(
        64, "most text to train it on (MB, a uniform sample of the corpus)", only="tokenizer.path=null"
    )


@dataclass
class OptimConfig:
    """`optim=`: the optimizer."""

    name: str = key("adamw", "adamw | muon, normuon: hidden matrices by these, everything else by AdamW")
    lr: float = key(3e-4, "peak learning rate")
    beta1: float = key(0.9, "AdamW: decay of the first moment")
    beta2: float = key(0.95, "AdamW: decay of the second moment; NorMuon: of rows' sizes")
    eps: float = key(1e-8, "AdamW: epsilon")
    weight_decay: float = key(0.1, "decoupled weight decay, applied to matrices only (not to norms)")
    momentum: float = key(0.95, "Muon: decay of the momentum", only="optim.name=muon|normuon")
    nesterov: bool = key(True, "Muon: Nesterov's momentum", only="optim.name=muon|normuon")
    update_scale: str = key(
        "rms",
        "Muon: size of an update of an m x n matrix: rms, 0.2 sqrt(max(m, n)), as large as AdamW's | spectral, "
        "sqrt(max(1, m / n))",
        only="optim.name=muon|normuon",
    )
    ns_steps: int = key(5, "Muon: Newton-Schulz steps that make an update orthogonal", only="optim.name=muon|normuon")
    ns_coefficients: str = key(
        "quintic", "Muon: of these steps: quintic | polar_express", only="optim.name=muon|normuon"
    )
    ns_dtype: str = key(
        "auto", "Muon: dtype of these steps: auto (that of precision) | bf16 | fp32", only="optim.name=muon|normuon"
    )
    split_heads: bool = key(
        False,
        "Muon: q, k and v of each head are matrices of their own, not of all heads together",
        only="optim.name=muon|normuon",
    )
    qk_clip: float = key(
        0.0,
        "Muon: largest attention logit that a head keeps: its rows of q and k are scaled down after a step with a larger one; "
        "0: none",
        only="optim.name=muon|normuon",
    )
    adamw_lr: Optional[float] = key(
        None, "Muon: peak learning rate of what AdamW updates; null: optim.lr", only="optim.name=muon|normuon"
    )
    adamw_weight_decay: Optional[float] = key(
        None, "Muon: weight decay of what AdamW updates; null: optim.weight_decay", only="optim.name=muon|normuon"
    )
    clip: float = key(1.0, "maximum norm of the gradient; 0: no clipping")
    scaling: str = key(
        "none",
        "how rates, decay and initial weights follow width and depth: none | mup, so that optim.lr found at base_width and "
        "base_layers holds",
    )
    base_width: int = key(192, "d_model at which optim.lr was found", only="optim.scaling=mup")
    base_layers: int = key(4, "layers at which optim.lr was found", only="optim.scaling=mup")


@dataclass
class ScheduleConfig:
    """`schedule=`: the learning rate over the run."""

    name: str = key("cosine", "cosine | linear | wsd")
    warmup: float = key(0.01, "fraction of the steps over which the learning rate rises from 0")
    final: float = key(0.1, "learning rate at the end, as a fraction of the peak")
    decay: float = key(0.2, "wsd: fraction of the steps over which the learning rate decays", only="schedule.name=wsd")


@dataclass
class ZeroConfig:
    """`zero=`: what DeepSpeed ZeRO partitions over data-parallel and context-parallel ranks."""

    stage: int = key(1, "0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters")
    offload_optimizer: bool = key(False, "keep the optimizer state in CPU memory")
    offload_parameters: bool = key(False, "stage 3: keep the parameters in CPU memory")
    bucket_elements: int = key(
        50_000_000,
        "elements per reduction or gather; stage 3 keeps up to 20 times as many gathered",
        only="zero.stage!=0",
    )
    overlap: Optional[bool] = key(
        None, "overlap gradient reduction with backward; null: at stage 3 on GPUs", only="zero.stage!=0"
    )


@dataclass
class ParallelConfig:
    """`parallel=`: model and sequence parallelism. World size = data x tensor x context."""

    tensor: int = key(1, "tensor-parallel ranks, which shard each matrix; best within a node")
    sequence: bool = key(
        False,
        "sequence parallelism over the tensor ranks between matmuls: less memory, a quarter more traffic",
        only="parallel.tensor>1",
    )
    context: int = key(1, "context-parallel ranks, which split each sequence; all-to-all over heads around attention")
    timeout_minutes: float = key(30.0, "timeout of a collective; the run stops after it")


@dataclass
class PrecisionConfig:
    """`precision=`: dtypes."""

    name: str = key(
        "auto", "auto (bf16 where the machine has its instructions; else, and at zero=0, fp32) | bf16 | fp32 | fp8"
    )
    reduce: str = key("fp32", "dtype of gradient reductions: fp32 | bf16", only="precision.name!=fp32")
    emulate: str = key(
        "none",
        "round the operands of attention's and the FFN's projections, on any device: none | fp8 | mxfp8 | nvfp4",
        only="precision.name!=fp8",
    )
    scaling: str = key(
        "rowwise",
        "scales of FP8 operands: rowwise | tensorwise",
        only="precision.name=fp8 or precision.emulate=fp8",
    )


@dataclass
class GuardConfig:
    """`guard=`: what happens when numbers go wrong."""

    skip_limit: int = key(
        20,
        "steps skipped in a row because a gradient is not finite, or log lines in a row with a gradient of zero, after which a "
        "run has diverged",
    )
    spike: str = key("report", "a loss or gradient norm far above those before: report | skip (the step) | rewind")
    spike_sigmas: float = key(6.0, "how far, in robust standard deviations (1.4826 x MAD) above the median")
    spike_window: int = key(
        128, "how many values before it count: of log lines for report, of steps for skip and rewind"
    )
    replicas: int = key(0, "steps between comparisons of the weights that data-parallel ranks hold alike; 0: none")
    repeat: int = key(0, "steps between gradients that are computed twice and compared bit for bit; 0: none")
    skip_samples: Optional[str] = key(
        None,
        "samples to leave out, A:B or several separated by commas; numbers from A to below B. Checkpoints keep them",
    )


@dataclass
class WatchdogConfig:
    """`watchdog=`: when a run that makes no progress is ended, with the stacks of every rank."""

    minutes: Optional[float] = key(
        None, "longest time for a step; null: 20 times the recent steps' median, at least 5; 0: no watchdog"
    )
    phase_minutes: float = key(
        20.0,
        "longest time without progress while starting, in the first step, evaluating, sampling, saving or finishing",
        only="watchdog.minutes!=0.0",
    )


@dataclass
class LoggerConfig:
    """`logger=`: loggers that mirror metrics.jsonl."""

    name: str = key("wandb", "name of the choice")
    wandb: bool = key(True, "Weights & Biases; offline when not logged in")
    tensorboard: bool = key(False, "TensorBoard event files in the run folder")
    project: Optional[str] = key(None, "wandb: project; null: WANDB_PROJECT, or ffn", only="logger.wandb=true")
    entity: Optional[str] = key(None, "wandb: team or user", only="logger.wandb=true")
    group: Optional[str] = key(
        None, "wandb: group of runs; `python -m ablation.run` sets the plan", only="logger.wandb=true"
    )
    job_type: Optional[str] = key(
        None,
        "wandb: job type, runs of one kind in a group; `python -m ablation.run` sets the arm",
        only="logger.wandb=true",
    )
    tags: Any = key([], "wandb: tags", only="logger.wandb=true")


@dataclass
class Config:
    """All keys of `train.py`."""

    run: Optional[str] = key(None, "name of the run folder; null: derived from the model, the arm and the overrides")
    runs: str = key("runs", "folder of the run folders")
    resume: bool = key(True, "resume the run of that name; false: refuse a run that exists")
    resume_optimizer: str = key(
        "keep",
        "on resuming: keep the optimizer's state, and refuse another optim | fresh: start a state anew where optim was changed",
    )
    resume_from: Optional[str] = key(
        None, "go back to this checkpoint of the run, step_N, and set later ones aside; null: go on from the newest"
    )
    steps: Optional[int] = key(None, "optimizer steps; wins over the preset's tokens")
    tokens: Optional[int] = key(None, "tokens to train on, rounded down to whole steps")
    seed: int = key(0, "seed of the initial weights")
    data_seed: int = key(0, "seed of the data order")
    sequence_length: int = key(512, "tokens per sequence")
    micro_batch_size: Optional[int] = key(None, "sequences per rank and forward pass; null: all of a rank's step")
    global_batch_size: int = key(8, "sequences per step, over all ranks and accumulation")
    eval_every: int = key(100, "steps between evaluations; 0: only at the end")
    eval_tokens: Optional[int] = key(
        None, "held-out tokens per periodic evaluation; null: all. The final evaluation uses all", only="eval_every>0"
    )
    sample_every: int = key(0, "steps between samples from the prompts; 0: only at the end", only="prompts!=[]")
    sample_tokens: int = key(96, "tokens per sample", only="prompts!=[]")
    prompts: Any = key(
        None, "prompts of the samples; null: Python for the standard library, else beginnings of held-out documents"
    )
    save_every: int = key(100, "steps between checkpoints; 0: only at the end")
    keep_last: int = key(2, "newest checkpoints to keep, beside the best one")
    log_every: int = key(1, "steps between lines of metrics.jsonl and of the console")
    log_seconds: float = key(
        5.0, "seconds between steps' lines of the console where that is no terminal; 0: a line per log_every steps"
    )
    profile: Optional[str] = key(None, "profile these steps, FIRST:LAST, into the run's folder profile/; null: none")
    telemetry_every: int = key(
        50, "steps between activation telemetry samples (telemetry lines of metrics.jsonl); 0: none"
    )
    telemetry_window: int = key(
        1_000_000, "sampled tokens without activity after which a unit counts as dead", only="telemetry_every>0"
    )
    deterministic: bool = key(False, "refuse nondeterministic operations")
    ffn: FFNConfig = field(default_factory=FFNConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


GROUPS = (
    "ffn",
    "model",
    "data",
    "tokenizer",
    "optim",
    "schedule",
    "zero",
    "parallel",
    "precision",
    "guard",
    "logger",
    "watchdog",
)
