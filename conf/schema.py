"""The typed schema: every key that `train.py` takes, its type, its default and one line of help.

What a key means is said here and nowhere else; `train.py --help` prints these lines. Values of a group's choices live in
`conf/<group>/<choice>.yaml`. What is not here: reading the command line (`conf/load.py`) and the rules by which values must
fit together (`conf/validate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


def key(default: Any, help: str) -> Any:
    """A dataclass field with a default and its line of help."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class FFNConfig:
    """`ffn=`: the feed-forward arm, given by its formula."""

    name: str = key("swiglu", "name of the arm, used in the name of the run")
    formula: str = key("silu(gate) * up", "of x (ungated, 2 matrices), or of gate and up (gated, 3 matrices)")
    parameters: Any = key(
        {}, "of the formula, by name: a number is fixed, {init: 0.25, share: layer | channel} is learned"
    )
    from_output: str = key("", "the derivative as a formula of the output h, where it is one: for save=output")
    save: str = key(
        "packed", "kept for backward beside the layer's input: packed (pre-activations) | output | everything | input"
    )
    init_scale: Optional[float] = key(
        None, "of the initial down projection; null: what gives every arm the initial output of swiglu"
    )
    per_layer: Any = key(
        {}, "other arms for some layers: {0: relu2, layers_4_7: {arm: geglu}, last: {parameters: {limit: 5}}}"
    )
    backend: str = key("auto", "what computes it: auto | reference | c | triton")


@dataclass
class ModelConfig:
    """`model=`: the decoder's shape."""

    name: str = key("nano", "name of the preset, used in the name of the run")
    d_model: int = key(256, "width of the residual stream")
    n_layers: int = key(4, "decoder layers")
    n_heads: int = key(4, "query heads")
    n_kv_heads: Optional[int] = key(None, "key and value heads (grouped-query attention); null: as many as n_heads")
    head_dim: Optional[int] = key(None, "channels a head; null: d_model / n_heads")
    d_ff: Optional[int] = key(
        None, "FFN width as built; null: d_ff_gated for a gated arm, 3/2 of it for an ungated one"
    )
    d_ff_gated: int = key(688, "FFN width of a gated arm (3 matrices); an ungated arm (2 matrices) gets 3/2 of it")
    vocab_size: Optional[int] = key(
        None, "rows of the embedding; null: the tokenizer's, rounded up to a multiple of 64"
    )
    rope_theta: float = key(10000.0, "base of the rotary frequencies")
    norm_eps: float = key(1e-5, "epsilon of RMSNorm")
    qk_norm: bool = key(False, "RMSNorm on queries and keys, per head")
    tie_embeddings: bool = key(False, "the output projection is the embedding")
    init_std: Optional[float] = key(None, "standard deviation of the initial weights; null: 1 / sqrt(d_model)")
    z_loss: float = key(0.0, "coefficient of logsumexp(logits)^2, added to the training loss")
    attention: str = key("auto", "attention backend: auto | flash | sdpa | flex | blocks")
    mask_documents: bool = key(False, "attention never crosses the end of a packed document")
    activation_checkpointing: bool = key(
        False, "recompute each layer in backward: less memory, about a third more time"
    )


@dataclass
class DataConfig:
    """`data=`: where the text comes from."""

    name: str = key("stdlib", "name of the corpus, used in the name of the prepared folder")
    source: str = key("stdlib", "reader: stdlib | text | jsonl | parquet | hf | blend")
    path: Any = key(None, "file, glob or folder, or a list of them (.gz and .zst are read too)")
    field: str = key("text", "jsonl, parquet, hf: the field that holds the text")
    subset: Optional[str] = key(None, "hf: configuration of the data set")
    split: str = key("train", "hf: split of the data set")
    held_out: float = key(0.04, "share of the documents held out for evaluation, chosen by a hash of their text")
    prepared: str = key("prepared", "folder in which prepared corpora are kept")
    shard_megabytes: int = key(64, "text of one shard (MB), the unit of parallel work and of resuming")
    workers: int = key(0, "processes that tokenize; 0: one a core")
    parts: Any = key({}, "blend: {name: {weight: W, source: ..., path: ...}}")


@dataclass
class TokenizerConfig:
    """`tokenizer=`: how text becomes tokens."""

    name: str = key("sentencepiece", "name of the choice")
    kind: str = key("sentencepiece", "sentencepiece | huggingface")
    path: Optional[str] = key(None, "a .model file or a tokenizer.json; null: train SentencePiece on the corpus")
    vocab_size: int = key(4096, "pieces of a tokenizer that is trained here")
    train_megabytes: int = key(64, "text that it is trained on, at most (MB, an even sample of the corpus)")


@dataclass
class OptimConfig:
    """`optim=`: the optimizer."""

    name: str = key("adamw", "adamw")
    lr: float = key(3e-4, "peak learning rate")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "epsilon of AdamW")
    weight_decay: float = key(0.1, "decoupled weight decay, of matrices only (never of norms)")
    clip: float = key(1.0, "largest norm of the whole gradient; 0 is off")


@dataclass
class ScheduleConfig:
    """`schedule=`: the learning rate over the run."""

    name: str = key("cosine", "cosine | linear | wsd")
    warmup: float = key(0.01, "share of the steps over which the rate rises from 0")
    final: float = key(0.1, "the rate at the end, as a share of the peak")
    decay: float = key(0.2, "wsd: share of the steps over which the rate falls")


@dataclass
class ZeroConfig:
    """`zero=`: what DeepSpeed ZeRO partitions over the data-parallel ranks."""

    stage: int = key(1, "0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters")
    offload_optimizer: bool = key(False, "keep the optimizer state in CPU memory")
    offload_parameters: bool = key(False, "stage 3: keep the parameters in CPU memory")
    bucket_elements: int = key(
        50_000_000, "elements reduced or gathered at once; stage 3 keeps up to 20 times as many whole"
    )
    overlap: bool = key(False, "reduce gradients while backward still runs")


@dataclass
class ParallelConfig:
    """`parallel=`: how ranks share the work. World size = data x tensor x context."""

    tensor: int = key(1, "ranks that share each matrix, best inside a node")
    sequence: bool = key(False, "between the matrices these ranks share the tokens too: less memory, the same traffic")
    context: int = key(1, "ranks that share each sequence, exchanged for heads around attention: long sequences")
    timeout_minutes: float = key(30.0, "a collective that takes longer stops the run")


@dataclass
class PrecisionConfig:
    """`precision=`: number formats."""

    name: str = key("auto", "auto: bf16 where the machine has bf16 instructions, else fp32")
    reduce: str = key("fp32", "format in which gradients are reduced over ranks: fp32 | bf16")


@dataclass
class LoggerConfig:
    """`logger=`: mirrors of metrics.jsonl."""

    name: str = key("wandb", "name of the choice")
    wandb: bool = key(True, "Weights & Biases; offline when not logged in")
    tensorboard: bool = key(False, "TensorBoard event files in the run folder")
    project: str = key("ffn", "wandb: project")
    entity: Optional[str] = key(None, "wandb: team or user")
    group: Optional[str] = key(None, "wandb: group of runs; the plan, for those of `python -m ablation.run`")
    job_type: Optional[str] = key(None, "wandb: job type, runs of one kind in a group; the arm, for those of a plan")
    tags: Any = key([], "wandb: tags")


@dataclass
class Config:
    """Everything that `train.py` takes."""

    run: Optional[str] = key(None, "name of the run folder; null: made from the model, the arm and what was overridden")
    runs: str = key("runs", "folder that holds the run folders")
    resume: bool = key(True, "go on where the run of that name stopped; false: refuse a run that exists")
    steps: Optional[int] = key(None, "optimizer steps; wins over the preset's tokens")
    tokens: Optional[int] = key(None, "tokens to train on, rounded down to whole steps")
    seed: int = key(0, "seed of the initial weights")
    data_seed: int = key(0, "seed of the data order")
    sequence_length: int = key(512, "tokens a sequence")
    micro_batch_size: Optional[int] = key(None, "sequences a rank takes at once; null: its whole share of a step")
    global_batch_size: int = key(8, "sequences a step, over all ranks and accumulation")
    eval_every: int = key(100, "steps between evaluations; 0: only at the end")
    eval_tokens: Optional[int] = key(
        None, "held-out tokens of a periodic evaluation; null: all. The last one takes all"
    )
    sample_every: int = key(0, "steps between samples from the prompts; 0: only at the end")
    sample_tokens: int = key(96, "tokens a sample")
    prompts: Any = key([], "prompts of the samples")
    save_every: int = key(100, "steps between checkpoints; 0: only at the end")
    keep_last: int = key(2, "newest checkpoints kept, beside the best one")
    log_every: int = key(1, "steps between lines of metrics.jsonl and of the console")
    telemetry_every: int = key(50, "steps between looks into the layers (telemetry lines of metrics.jsonl); 0: none")
    telemetry_window: int = key(1_000_000, "tokens looked at without seeing a unit active before it is called dead")
    deterministic: bool = key(False, "refuse operations whose result may differ between runs")
    ffn: FFNConfig = field(default_factory=FFNConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class AblationConfig:
    """`ablation=`: a plan, which `python -m ablation.run` turns into runs; its keys are typed as `ablation.KEY=VALUE`."""

    name: str = key("", "name of the plan, and of the folder of its runs")
    question: str = key("", "what the plan is to answer, in a sentence")
    baseline: str = key("", "the arm that all others are compared with")
    arms: Any = key(None, "names of arms of conf/ffn, or {name: its overrides}: {mine: ffn=custom ffn.formula=gate*up}")
    sizes: Any = key(None, "{name: overrides that make a size}; null: {nano: model=nano}")
    common: Any = key([], "overrides of every run, typed as for train.py")
    rates: Any = key([0.5, 1.0, 2.0], "learning rates to try, times the size's optim.lr; one: no sweep, and no verdict")
    rate_extensions: int = key(2, "how often a sweep goes on past an edge where its best rate lies")
    rate_seed: int = key(1000, "seed of the sweep, which is none of `seeds`")
    seeds: Any = key([0, 1, 2, 3, 4], "seeds of the runs that are compared, of weights and data alike")
    budget: str = key("parameters", "what arms have in common: parameters | flops | memory | wallclock | none")
    allowed_mismatch: float = key(0.01, "the share of the budget that a width may be off")
    tile: int = key(128, "the coarsest multiple that a width may be rounded to, on every tensor rank")
    metric: str = key("final_eval_loss", "of summary.json, by which arms are judged; less is better")
    smallest_effect: float = key(0.01, "the difference that is worth finding, nats a token")


@dataclass
class HardwareConfig:
    """What a node is made of. Rates are in one direction; FLOP/s are dense, without sparsity."""

    device: str = key("", "what the GPU is called")
    memory_gib: float = key(80.0, "of a GPU")
    bf16_flops: float = key(1e15, "peak FLOP/s of a GPU in bf16")
    fp32_flops: float = key(6.7e13, "peak FLOP/s of a GPU in fp32")
    memory_bandwidth: float = key(3.35e12, "bytes/s between a GPU and its memory")
    node_bandwidth: float = key(4.5e11, "bytes/s that a GPU sends to others of its node")
    network_bandwidth: float = key(5e10, "bytes/s that a GPU sends to other nodes")
    network_latency: float = key(2e-6, "seconds of a hop between two ranks of a ring")
    host_bandwidth: float = key(5.5e10, "bytes/s between a GPU and the host's memory")
    watts: float = key(700.0, "power limit of a GPU")
    full_watts: float = key(700.0, "power at which it reaches its peak")
    node_watts: float = key(10200.0, "of a whole node under load, cooling not counted")
    dollars_per_gpu_hour: float = key(2.5, "price; a rented GPU's, or your own")


@dataclass
class ClusterConfig:
    """`cluster=`: a machine that `launch.slurm` submits to and `launch.estimate` reckons with; typed as `cluster.KEY=VALUE`."""

    name: str = key("", "name of the choice")
    gpus_per_node: int = key(8, "GPUs of a node; 0: it has none, and ranks share its cores")
    cpus_per_node: int = key(96, "cores of a node")
    partition: Optional[str] = key(None, "of SLURM")
    account: Optional[str] = key(None, "of SLURM")
    qos: Optional[str] = key(None, "of SLURM")
    constraint: Optional[str] = key(None, "of SLURM: features that nodes must have")
    memory: Optional[str] = key("0", "of a node, as SLURM takes it; 0: all")
    time: str = key("24:00:00", "limit of a job; one that is not done goes on in another")
    signal_seconds: int = key(120, "before the limit or a preemption, to save in")
    gpu_request: str = key("--gpus-per-node", "how GPUs are asked for: --gpus-per-node, --gres, or none")
    tasks: str = key("gpu", "tasks of srun on a node: gpu, one a GPU; node, one that starts its ranks itself")
    python: Optional[str] = key(None, "interpreter; null: the one that submits, or python inside a container")
    container: str = key("none", "none, apptainer, or pyxis")
    image: Optional[str] = key(None, "of the container")
    mounts: Any = key([], "of the container, HOST:INSIDE")
    modules: Any = key([], "to load before")
    setup: Any = key([], "lines of shell before, such as the activation of an environment")
    environment: Any = key({}, "variables of every rank, such as NCCL_SOCKET_IFNAME")
    sbatch: Any = key([], "further options of sbatch, one an item")
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


GROUPS = ("ffn", "model", "data", "tokenizer", "optim", "schedule", "zero", "parallel", "precision", "logger")
