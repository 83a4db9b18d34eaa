"""Parameters, FLOPs and bytes of a shape (`conf/shape.py`), without torch.

Conventions: a multiply-add is two FLOPs; backward costs twice forward; the token embedding is a lookup and costs none.
Traffic is the bytes that a rank sends in a ring of p ranks: 2 n (p - 1) / p for an all-reduce of n bytes, half of that for
an all-gather, a reduce-scatter or an all-to-all. Attention is counted causal, as in PaLM (arXiv 2204.02311, appendix
B) but with half of its square, since no backend here computes the masked half on purpose. MFU is FLOPs per token x
tokens/s / peak FLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable

from conf.optimizers import OPTIMIZERS, Rule
from conf.schema import Config, ParallelConfig, ZeroConfig
from conf.shape import FFNShape, Shape
from launch.estimate.optimizer import hidden_parameters, optimizer_working_bytes

# What `flops_per_token` counts, beside every MFU that is shown.
CONVENTION = "attention counted causal, the embedding not"
# Elements in one chunk of logits of the loss, and its minimum number of rows: with few rows the matmul of the weight gradient
# spends its time reading and writing the result: on an H100, 8 bytes per element at 3.35 TB/s, at 4,096 rows a seventh of the
# time of the product at 500 TFLOP/s.
_CHUNK_ELEMENTS, _CHUNK_ROWS = 2**22, 256
_GPU_CHUNK_ELEMENTS, _GPU_CHUNK_ROWS = 2**28, 4096
# Values of `model.activation_checkpointing`, by what backward computes again; the FFN's up projection under "selective" only.
CHECKPOINTING = (False, "attention", "selective", True)
RECOMPUTE_ATTENTION = ("attention", "selective")
GATHERED_BUCKETS = 20  # times `zero.bucket_elements`: the most elements that stage 3 keeps gathered


def parameters(shape: Shape) -> dict[str, int]:
    """Return the number of parameters by part; the values sum to the whole model."""
    queries, keys_values = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    attention = shape.d_model * (2 * queries + 2 * keys_values)  # in: q, k, v; out: o
    norms = 2 * shape.d_model + (2 * shape.head_dim if shape.qk_norm else 0)
    embedding = shape.vocab_size * shape.d_model
    return {
        "embedding": embedding,
        "attention": shape.n_layers * attention,
        "ffn": shape.ffn_sum(lambda layer: layer.parameters(shape.d_model)),
        "norms": shape.n_layers * norms + shape.d_model,
        "output": 0 if shape.tied else embedding,
    }


def flops_per_token(shape: Shape, sequence_length: int) -> dict[str, int]:
    """Return training FLOPs (forward and backward) per token by part; the values sum to the whole step."""
    by_part = parameters(shape)
    forward = {
        "attention": 2 * by_part["attention"],
        "ffn": shape.ffn_sum(lambda layer: 2 * layer.matrices * shape.d_model * layer.d_ff),
        "output": 2 * shape.vocab_size * shape.d_model,
    }
    result = {part: 3 * flops for part, flops in forward.items()}
    result["attention"] += score_flops_per_token(shape, sequence_length)
    return result


def score_flops_per_token(shape: Shape, sequence_length: int) -> int:
    """Return the part of `flops_per_token` that attention spends on scores and their product with the values.

    In forward that is 2 x 2 x head_dim x positions attended to, on average (length + 1) / 2.
    """
    return 3 * shape.n_layers * 2 * shape.n_heads * shape.head_dim * (sequence_length + 1)


def ffn_saved_bytes(layer: FFNShape, width: int = 2) -> int:
    """Return the bytes per token that a feed-forward layer saves for backward (`ffn.save`), without its input.

    Args:
        width: bytes per element.
    """
    pre_activations = layer.matrices - 1
    kept = {"packed": pre_activations, "output": 1, "everything": pre_activations + 1, "input": 0}[layer.arm.save]
    return width * kept * layer.d_ff


def ffn_recomputed_flops(shape: Shape) -> int:
    """Return the FLOPs per token that backward spends on what `ffn.save=input` did not keep: the up and gate projections."""
    return sum(
        2 * (layer.matrices - 1) * shape.d_model * layer.d_ff for layer in shape.ffn if layer.arm.save == "input"
    )


def attention_recomputed_flops(shape: Shape, sequence_length: int) -> int:
    """Return the FLOPs per token that backward spends on queries, keys, values and attention, where it recomputes those."""
    heads = shape.n_heads + 2 * shape.n_kv_heads
    projections = shape.n_layers * 2 * shape.d_model * heads * shape.head_dim
    return projections + score_flops_per_token(shape, sequence_length) // 3


def tensor_traffic(
    shape: Shape, parallel: ParallelConfig, tokens: int, width: int, checkpointing: bool | str = False
) -> dict[str, float]:
    """Return the bytes that a tensor rank sends for forward and backward of one micro-batch, by part.

    Per layer that is 4 all-reduces of the activations, 8 b s h (t - 1) / t elements: Narayanan 2021, arXiv 2104.04473, section
    3.2. Sequence parallelism makes them 4 reduce-scatters and 4 all-gathers, of the same volume, and gathers the input of two
    matmuls again in backward, 2 more: Korthikanti 2022, arXiv 2205.05198, section 4.2.2. The rest is small: the loss, and a
    formula with reductions, need a few numbers per token from other ranks, and gradients of replicated parameters are reduced.

    Args:
        tokens: of a rank's micro-batch, b s, divided over context ranks.
        width: bytes per element of the activations.
        checkpointing: `model.activation_checkpointing`. A whole layer is sent again; of attention, what gathers its input.
    """
    ring = (parallel.tensor - 1) / parallel.tensor
    sequence = parallel.sequence and parallel.tensor > 1
    unit = tokens * shape.d_model * width * ring  # of one all-gather or reduce-scatter
    norm = 2 * shape.d_model * width * ring if sequence else 0.0
    heads = 2 * 2 * shape.head_dim * width * ring if shape.qk_norm else 0.0
    learned = [2 * 4 * layer.learned_per_layer * ring for layer in shape.ffn]  # in fp32
    gathered = 4 * tokens * (parallel.tensor - 1)  # of one number per token from every rank, in fp32
    forwards = 2 if checkpointing is True else 1
    reduced = [gathered * (forwards * layer.reduced + layer.adjoints) for layer in shape.ffn]
    again = 4 if checkpointing is True else int(sequence and checkpointing in RECOMPUTE_ATTENTION)
    layer = ((10 if sequence else 8) + again) * unit + 2 * norm + heads
    return {
        "embedding": 2 * unit,
        "layers": shape.n_layers * layer + sum(learned) + sum(reduced),
        "head": 2 * unit + tokens * 2 * 4 * (parallel.tensor - 1) + norm,
    }


def context_traffic(
    shape: Shape, parallel: ParallelConfig, tokens: int, width: int, checkpointing: bool | str = False
) -> float:
    """Return the bytes that a context rank sends around attention for one micro-batch, over all layers.

    Two all-to-alls each in forward and backward: of queries, keys and values, and of the result
    (Jacobs 2023, arXiv 2309.14509, section 3.2).

    Args:
        tokens: of this rank's part of the micro-batch.
        checkpointing: `model.activation_checkpointing`: whichever recomputes attention sends a third time.
    """
    heads = (2 * shape.n_heads + 2 * shape.n_kv_heads) // parallel.tensor
    ring = (parallel.context - 1) / parallel.context
    return (3 if checkpointing else 2) * shape.n_layers * heads * shape.head_dim * tokens * width * ring


def zero_traffic(
    rank_parameters: int,
    dp_cp: int,
    stage: int,
    accumulation: int,
    width: int,
    gradient_width: int = 4,
    gathers: int | None = None,
) -> dict[str, float]:
    """Return the bytes that a rank sends for ZeRO per step.

    In units of the parameters, ZeRO (Rajbhandari 2020, arXiv 1910.02054, section 7) needs 2 for stages 1 and 2, and 3 for
    stage 3. DeepSpeed 0.19 reduces gradients with an all-reduce in stages 1 and 2, where a reduce-scatter would do: 3.
    Padding is not counted.

    Args:
        rank_parameters: parameters of a tensor rank.
        width, gradient_width: bytes per weight, and per gradient element in communication.
        gathers: how often a step of stage 3 gathers each weight; None: for forward and backward of every micro-batch.
            DeepSpeed gathers weights less often that it keeps in between (`zero.bucket_elements` bounds them).
    """
    unit = rank_parameters * (dp_cp - 1) / dp_cp
    if stage < 3:
        gathers = min(stage, 1)
    elif gathers is None:
        gathers = 2 * accumulation
    times = accumulation if stage >= 2 else 1  # stages 0 and 1 reduce at the end of a step
    return {
        "gradients": (1 if stage == 3 else 2) * times * unit * gradient_width,
        "weights": gathers * unit * width,
    }


def host_traffic(rank_parameters: int, zero: ZeroConfig, dp_cp: int, accumulation: int, width: int) -> float:
    """Return the bytes that a rank moves per step between a GPU and the host's memory for weights that are kept there.

    Stage 3 brings a rank's partition to the GPU before every gather, as often as `zero_traffic` counts. An optimizer on the GPU
    writes it back once; one on the host updates it in place.

    Args:
        width: bytes per weight.
    """
    if not zero.offload_parameters:
        return 0.0
    return (2 * accumulation + (not zero.offload_optimizer)) * width * rank_parameters / dp_cp


def overlaps(zero: ZeroConfig, on_gpu: bool) -> bool:
    """Return what `zero.overlap` means: where it is null, as DeepSpeed by itself, at stage 3; on a CPU there is no stream."""
    return (on_gpu and zero.stage == 3) if zero.overlap is None else zero.overlap


def rank_parameters(shape: Shape, tensor: int) -> int:
    """Return the parameters of a tensor rank: its shards, and everything that is replicated."""
    counts = parameters(shape)
    replicated = counts["norms"] + shape.ffn_sum(lambda layer: layer.learned_per_layer)
    return replicated + (sum(counts.values()) - replicated) // tensor


def by_rule(shape: Shape, tensor: int, optimizer: str, value: Callable[[Rule], float]) -> float:
    """Return the sum over a tensor rank's parameters of a value that depends on the rule which the optimizer has for them."""
    hidden, chosen = hidden_parameters(shape, tensor), OPTIMIZERS[optimizer]
    return value(chosen.hidden) * hidden + value(chosen.others) * (rank_parameters(shape, tensor) - hidden)


def state_bytes(
    shape: Shape,
    tensor: int,
    dp_cp: int,
    stage: int,
    bf16: bool = True,
    micro_batches: int = 1,
    offload: bool = False,
    optimizer: str = "adamw",
) -> dict[str, float]:
    """Return the bytes of a rank's weights, gradients and optimizer state, without buffers of fixed size.

    The ZeRO paper (Rajbhandari 2020, arXiv 1910.02054, section 5) counts 2 + 2 + 12 bytes per parameter in bf16 and partitions
    the optimizer state from stage 1 on, the gradients from 2 on, the weights at 3. DeepSpeed 0.19 differs in three places:
    stage 1 frees the gradients of other partitions once reduced, unless it accumulates micro-batches; it accumulates in fp32;
    and in fp32 ZeRO updates a copy of the weights. Stage 1 on a single rank partitions nothing.

    Args:
        dp_cp: ranks that ZeRO partitions over, data-parallel x context-parallel.
        micro_batches: per step and rank.
        offload: whether the optimizer state is on the host, not on the device.
        optimizer: `optim.name`, which decides how many fp32 numbers are kept per parameter.
    """
    own, width = rank_parameters(shape, tensor), 2 if bf16 else 4
    unpartitioned = stage == 1 and dp_cp == 1 and not offload
    gradient = width
    # Accumulated in fp32; beside a single micro-batch the bf16 gradients stay.
    if bf16 and (micro_batches > 1 or unpartitioned):
        gradient = 4 if micro_batches > 1 else 6
    copies = bf16 or not (stage == 0 or unpartitioned)
    keeps_all = stage == 0 or (stage == 1 and micro_batches > 1)
    kept = by_rule(shape, tensor, optimizer, lambda rule: len(rule.states))
    return {
        "weights": width * own / (dp_cp if stage >= 3 else 1),
        "gradients": gradient * own / (1 if keeps_all else dp_cp),
        "optimizer": 0.0 if offload else 4 * (kept + (own if copies else 0)) / (dp_cp if stage >= 1 else 1),
    }


def host_bytes(config: Config, shape: Shape, dp_cp: int, bf16: bool) -> dict[str, float]:
    """Return the bytes of a GPU's weights and optimizer state that are kept in the host's memory.

    An optimizer on the host has a copy of the weights in fp32, whatever the stage. Gradients and buffers are not counted.
    """
    zero, tensor = config.zero, config.parallel.tensor
    own = rank_parameters(shape, tensor)
    kept = by_rule(shape, tensor, config.optim.name, lambda rule: len(rule.states))
    return {
        "weights": (2 if bf16 else 4) * own / dp_cp if zero.offload_parameters else 0.0,
        "optimizer": 4 * (kept + own) / dp_cp if zero.offload_optimizer else 0.0,
    }


def checkpoint_bytes(shape: Shape, optimizer: str) -> float:
    """Return the bytes of the tensors of a checkpoint: in fp32 the weights and what the optimizer keeps of each parameter.

    Weights in bf16 are not stored. What an optimizer keeps per row, and the index, are a percent of it or less.
    """
    return 4 * (rank_parameters(shape, 1) + by_rule(shape, 1, optimizer, lambda rule: len(rule.states)))


def logits_rows(tokens: int, vocabulary: int, on_gpu: bool) -> int:
    """Return the number of tokens per chunk of logits in the loss, for this many vocabulary entries (model/loss.py)."""
    elements, rows = (_GPU_CHUNK_ELEMENTS, _GPU_CHUNK_ROWS) if on_gpu else (_CHUNK_ELEMENTS, _CHUNK_ROWS)
    return max(1, min(tokens, max(rows, elements // vocabulary)))


def activation_bytes(
    shape: Shape,
    parallel: ParallelConfig,
    tokens: int,
    width: int,
    checkpointing: bool | str = False,
    on_gpu: bool = False,
) -> dict[str, float]:
    """Return the bytes that a rank needs for forward and backward of a micro-batch, beside weights and gradients.

    A layer saves, per token: the inputs of its norms and matmuls (4 d_model), queries, keys and values before and after
    the rotary embedding, the output of attention, the softmax's logsumexp, the inverse RMS of the norms, and what `ffn.save`
    selects. Attention scores are never saved: all backends recompute them.

    Args:
        tokens: of the micro-batch, divided over context ranks.
        width: bytes per element.
        checkpointing: `model.activation_checkpointing`: True, and each layer saves its input only; "attention" or
            "selective", and it saves what its two norms read and what its feed-forward layer saves beside its input.

    Returns:
        "layers" is kept from forward to backward. On top come: "loss" at the end of forward; "head" when backward multiplies
        the gradients that the loss has computed, of which "output" (that of the output's weights) stays until it is reduced;
        and "backward" within a layer's backward.
    """
    tensor = parallel.tensor
    sequence = tensor if parallel.sequence else 1  # ranks that split the tokens between matmuls
    queries, keys = shape.n_heads * shape.head_dim / tensor, shape.n_kv_heads * shape.head_dim / tensor
    inverse_rms = 4 * (2 / sequence + (shape.n_heads + shape.n_kv_heads) / tensor * shape.qk_norm)
    attention = width * 3 * (queries + keys) + 4 * shape.n_heads / tensor
    if checkpointing in RECOMPUTE_ATTENTION:
        inputs = width * 2 * shape.d_model / sequence + 4 * 2 / sequence
    else:
        inputs = width * 4 * shape.d_model / sequence + attention + inverse_rms

    def kept(layer: FFNShape) -> float:
        return inputs + ffn_saved_bytes(layer, width) / tensor + (4 * layer.reduced if tensor > 1 else 0)

    working = max(
        width * ((layer.matrices + 1 + _made_again(layer)) * layer.d_ff / tensor + 2 * shape.d_model)
        for layer, _ in shape.ffn_counts
    )
    if checkpointing in RECOMPUTE_ATTENTION:  # and then its gradients, while the norm's output is there again
        attending = attention + width * (queries + 2 * keys + 2 * shape.d_model)
        working = max(working + width * shape.d_model / sequence, attending)
    vocabulary = shape.vocab_size // tensor
    states, output = tokens * shape.d_model * width, vocabulary * shape.d_model
    # Over tensor ranks a CPU has no fused kernel, and takes the softmax in a buffer of its own.
    chunk = logits_rows(tokens, vocabulary, on_gpu) * vocabulary * (width + (4 if tensor > 1 and not on_gpu else 0))
    rounded = width if width < 4 else 0  # the gradient of the output's weights is summed in fp32
    whole = checkpointing is True
    layers = tokens * (shape.n_layers * width * shape.d_model / sequence if whole else shape.ffn_sum(kept))
    return {
        "layers": layers,
        "loss": 2 * states + (4 + rounded) * output + chunk,
        "head": 2 * states + 2 * width * output,
        "output": width * output,
        "backward": 3 * states
        + tokens * (working + (max(kept(layer) for layer, _ in shape.ffn_counts) if whole else 0)),
    }


def _made_again(layer: FFNShape) -> int:
    """Return how many tensors of d_ff backward makes again before their gradients: pre-activations that were not saved."""
    return layer.matrices - 1 if layer.arm.save == "input" else 0


def peak_bytes(
    config: Config,
    shape: Shape,
    dp_cp: int,
    micro_batch: int,
    micro_batches: int,
    bf16: bool = True,
    on_gpu: bool = False,
) -> dict[str, float]:
    """Return the peak bytes of a rank, by part; the values sum to the peak.

    The peak is at the end of forward, at the start or the end of backward, or in the optimizer step, whichever needs most.

    Args:
        dp_cp: ranks that ZeRO partitions over, data-parallel x context-parallel.
        micro_batch: sequences per rank at once.
        micro_batches: per step and rank.
        bf16: else fp32.
        on_gpu: else on a CPU, where the loss works in smaller chunks, and what is offloaded stays in the same memory.
    """
    zero, parallel, width = config.zero, config.parallel, 2 if bf16 else 4
    offload, on_host = (zero.offload_optimizer and on_gpu), (zero.offload_parameters and on_gpu)
    states = state_bytes(shape, parallel.tensor, dp_cp, zero.stage, bf16, micro_batches, offload, config.optim.name)
    own, partitions = rank_parameters(shape, parallel.tensor), dp_cp if zero.stage >= 1 else 1
    tokens = micro_batch * config.sequence_length // parallel.context
    needs = activation_bytes(shape, parallel, tokens, width, config.model.activation_checkpointing, on_gpu)
    bucket = min(zero.bucket_elements, own) if zero.stage and dp_cp > 1 else 0
    reduces = bucket * (
        width * (2 if overlaps(zero, on_gpu) else 1) + (4 if bf16 and config.precision.reduce == "fp32" else 0)
    )
    # A single rank gathers too where its weights are on the host.
    gathers = zero.stage == 3 and (dp_cp > 1 or on_host)
    gathered = width * min(GATHERED_BUCKETS * zero.bucket_elements, own) if gathers else 0.0
    unpartitioned = zero.stage == 1 and dp_cp == 1 and not offload
    # Kept during forward: the sum over earlier micro-batches, or the fp32 gradient that stage 1 on a single rank keeps.
    waiting = states["gradients"] if micro_batches > 1 else 4.0 * own if unpartitioned and bf16 else 0.0
    copies = (bf16 or zero.stage > 0) and not unpartitioned and not offload
    stepping = (4 + (2 if bf16 and zero.stage < 3 else 0)) * own / partitions if copies else 0.0
    stepping += optimizer_working_bytes(shape, config.optim, parallel.tensor, dp_cp, zero.stage, width)
    gradients, layers, backward = states["gradients"], needs["layers"], needs["backward"]
    by_part = parameters(shape)
    last = (0 if shape.tied else by_part["embedding"]) + (by_part["attention"] + by_part["ffn"]) / shape.n_layers
    so_far = max(waiting, gradients * (1 - last / sum(by_part.values())))  # without those of the first layer and below
    output = (2 if zero.stage == 3 else 1) * needs["output"]  # stage 3 copies what it reduces
    moments = [
        {"gradients": waiting, "activations": layers, "working": needs["loss"], "buffers": gathered},
        {"gradients": waiting, "activations": layers, "working": needs["head"], "buffers": gathered},
        {"gradients": waiting, "activations": layers, "working": output + backward, "buffers": reduces + gathered},
        {
            "gradients": so_far,
            "activations": layers / shape.n_layers,
            "working": backward,
            "buffers": reduces + gathered,
        },
        {"gradients": gradients, "activations": 0.0, "working": stepping, "buffers": reduces},
    ]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    return {"weights": 0.0 if on_host else states["weights"], "optimizer": states["optimizer"], **worst}
