"""What `bench.train` compares `train.py` with, in one process each: other libraries' models in a plain loop, and two bounds.

Each library's contender is its own decoder with SwiGLU, RMSNorm, rotary embeddings, and QK-norm where ours has it, so that all
have the same parameters and multiply the same matrices. Its loss is computed as the library's own training recipe does it. The
loop around it is the same for all: forward, backward, clipping by the norm, fused AdamW, in the dtype that `train.py` chooses.
The bounds are the engine of `train.py` without the loop around it, and a step's matrix products without anything else.

A builder takes (shape, sequence length) and returns the model and its loss: a function of the inputs and the targets, int64
(B, S) each. It raises ImportError where the library is not installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.huggingface import widths
from bench.ranks import engine_of
from conf.load import load
from conf.schema import Config
from conf.shape import Shape, shape_of
from data.batches import BatchStream, open_dataset
from data.prepare import prepare
from kernels.common.errors import UserError
from launch.estimate.counts import parameters
from launch.ranks import find_ranks
from training.machine import find_device, find_dtype
from training.process_group import start_process_group

Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor], Any]


def transformers_model(shape: Shape, sequence_length: int) -> tuple[nn.Module, Loss]:
    """Build Llama, or with QK-norm Qwen3, whose decoder is otherwise the same."""
    import transformers

    family = "Qwen3" if shape.qk_norm else "Llama"
    settings = {**widths(shape), "max_position_embeddings": sequence_length, "use_cache": False}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Given labels, the model computes the loss itself. `shift_labels` are the targets; `labels` only ask for the loss.
    return model, lambda inputs, targets: model(input_ids=inputs, labels=inputs, shift_labels=targets).loss


def transformers_compiled(shape: Shape, sequence_length: int) -> tuple[nn.Module, Loss]:
    """Build the same, compiled as a whole in torch.compile's default mode."""
    model, loss = transformers_model(shape, sequence_length)
    model.compile()
    return model, loss


def litgpt_compiled(shape: Shape, sequence_length: int) -> tuple[nn.Module, Loss]:
    """Build LitGPT's GPT, compiled, with the chunked loss, as `litgpt pretrain` trains it."""
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    config = Config(
        block_size=sequence_length,
        n_layer=shape.n_layers,
        n_embd=shape.d_model,
        n_head=shape.n_heads,
        n_query_groups=shape.n_kv_heads,
        head_size=shape.head_dim,
        intermediate_size=shape.ffn[0].d_ff,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        norm_class_name="RMSNorm",
        norm_qk=shape.qk_norm,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    if shape.tied:
        model.transformer.wte.weight = model.lm_head.weight
    model.compile()
    return model, lambda inputs, targets: chunked_cross_entropy(model(inputs), targets)


def torchtune_model(shape: Shape, sequence_length: int) -> tuple[nn.Module, Loss]:
    """Build torchtune's Llama 3.2 with the chunked loss, both not compiled: the default of its recipes."""
    from torchtune.models.llama3_2 import llama3_2  # pyright: ignore[reportMissingImports]
    from torchtune.modules import RMSNorm  # pyright: ignore[reportMissingImports]
    from torchtune.modules.loss import CEWithChunkedOutputLoss  # pyright: ignore[reportMissingImports]

    model = llama3_2(
        vocab_size=shape.vocab_size,
        num_layers=shape.n_layers,
        num_heads=shape.n_heads,
        num_kv_heads=shape.n_kv_heads,
        embed_dim=shape.d_model,
        max_seq_len=sequence_length,
        intermediate_dim=shape.ffn[0].d_ff,
        tie_word_embeddings=shape.tied,
    )
    if shape.qk_norm:  # the builder has no argument for it, the attention layer has
        for layer in model.layers:
            layer.attn.q_norm, layer.attn.k_norm = RMSNorm(shape.head_dim), RMSNorm(shape.head_dim)
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    return model, lambda inputs, targets: loss(model(inputs), targets)


class Contender(NamedTuple):
    """The package that a contender needs, and the builder of its model."""

    package: str
    build: Callable[[Shape, int], tuple[nn.Module, Loss]]


CONTENDERS = {
    "transformers": Contender("transformers", transformers_model),
    "transformers compiled": Contender("transformers", transformers_compiled),
    "litgpt compiled": Contender("litgpt", litgpt_compiled),
    "torchtune": Contender("torchtune", torchtune_model),
    "transformers, default allocator": Contender("transformers", transformers_model),
}


def measure(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Train a contender on the corpus of a run, in this process.

    Returns:
        `seconds` and `cpu_seconds` of each step, `dtype`, `threads`, and of a library its `version`; or `left_out`, the reason
        why the contender cannot run here.

    Raises:
        UserError: the contender's model does not have as many parameters as ours.
    """
    config = load(overrides)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    stream = BatchStream(dataset, config.sequence_length, config.data_seed)
    shape = shape_of(config, dataset.vocab_size)
    device = find_device(find_ranks())  # also sets threads, and flushes denormal numbers to zero, as in train.py
    dtype = find_dtype(config, device)
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    if name == "engine alone":
        step = _engine_step(overrides, device)
    elif name == "matrix products alone":
        step = products_step(config, shape, device, dtype)
    else:
        package = CONTENDERS[name].package
        try:
            step = _library_step(name, config, shape, device, dtype)
        except ImportError as error:
            return {"left_out": f"{package} cannot be imported: {error}"}
        facts["version"] = version(package)
    seconds, cpu_seconds = [], []
    for number in range(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(torch.from_numpy(stream.samples(number * config.global_batch_size, config.global_batch_size)).to(device))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, **facts}


def _library_step(name: str, config: Config, shape: Shape, device: torch.device, dtype: torch.dtype) -> Step:
    """Return a step of a library's model in the common loop: a function of tokens (B, S + 1)."""
    model, loss = CONTENDERS[name].build(shape, config.sequence_length)
    count, ours = sum(parameter.numel() for parameter in model.parameters()), sum(parameters(shape).values())
    if count != ours:
        raise UserError(f"the model of {name} has {count:,} parameters, ours has {ours:,}")
    model.to(device, dtype).train()
    optim = config.optim
    settings = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)

    def step(tokens: Tensor) -> None:
        objective = loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.item()

    return step


def _engine_step(overrides: list[str], device: torch.device) -> Step:
    ranks = find_ranks()
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # DeepSpeed insists on it, even where one rank has no launcher
    start_process_group(ranks, device, 10.0)
    engine, _, _ = engine_of(overrides, ranks)
    return lambda tokens: engine.train_step(tokens, 1.0)


def products_step(config: Config, shape: Shape, device: torch.device, dtype: torch.dtype) -> Step:
    """Return the matrix products of a step's projections, forward and backward; it does not look at the tokens.

    Those of attention's scores are left out. Every layer's products read the same matrices, in our fused shapes.
    """
    rows, width, d_ff = config.global_batch_size * config.sequence_length, shape.d_model, shape.ffn[0].d_ff
    queries, keys_values = shape.n_heads * shape.head_dim, 2 * shape.n_kv_heads * shape.head_dim
    layers = shape.n_layers
    sizes = [(width, queries + keys_values, layers), (queries, width, layers)]  # (in, out, times)
    sizes += [(width, 2 * d_ff, layers), (d_ff, width, layers), (width, shape.vocab_size, 1)]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    operands = [(normal(rows, n), normal(m, n), normal(rows, m), times) for n, m, times in sizes]

    def step(_: Tensor) -> None:
        for x, weight, gradient, times in operands:
            for _repeat in range(times):
                projection_products(x, weight, gradient)

    return step


def projection_products(
    x: Tensor, weight: Tensor, gradient: Tensor, out: Sequence[Tensor | None] = (None, None, None)
) -> None:
    """Multiply what a projection multiplies, forward and backward, for T tokens.

    Args:
        x: (T, in). weight: (out, in). gradient: of the result, (T, out).
        out: where the result and the gradients of x and of the weight go; None: into new memory.
    """
    torch.mm(x, weight.T, out=out[0])
    torch.mm(gradient, weight, out=out[1])
    torch.mm(gradient.T, x, out=out[2])
