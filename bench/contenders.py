"""Other libraries' training loops over a model of a run's shape: what `bench.train` compares `train.py` with.

Each contender is the library's own decoder with SwiGLU, RMSNorm, rotary embeddings, and QK-norm where ours has it, so that all
have the same parameters and multiply the same matrices. Its loss is computed as the library's own training recipe does it. The
loop around it is the same for all: forward, backward, clipping by the norm, fused AdamW, in the dtype that `train.py` chooses.

A builder takes (shape, sequence length) and returns the model and its loss: a function of the inputs and the targets, int64
(B, S) each. It raises ImportError where the library is not installed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from bench.huggingface import widths
from conf.load import load
from data.batches import BatchStream, open_dataset
from data.prepare import prepare
from kernels.common.errors import UserError
from launch.estimate.counts import Shape, parameters, shape_of
from launch.ranks import find_ranks
from training.machine import find_device, find_dtype

Loss = Callable[[Tensor, Tensor], Tensor]


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


@dataclasses.dataclass(frozen=True)
class Contender:
    """A library's model in the common loop, and whether the allocator is set as `train.py` sets it."""

    package: str
    build: Callable[[Shape, int], tuple[nn.Module, Loss]]
    keep_freed_memory: bool = True


CONTENDERS = {
    "transformers": Contender("transformers", transformers_model),
    "transformers compiled": Contender("transformers", transformers_compiled),
    "litgpt compiled": Contender("litgpt", litgpt_compiled),
    "torchtune": Contender("torchtune", torchtune_model),
    "transformers, default allocator": Contender("transformers", transformers_model, keep_freed_memory=False),
}


def measure(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Train a contender on the corpus of a run, in this process.

    Returns:
        `seconds` of each step, `dtype`, `threads`, `parameters`, and the library's `version`; or `left_out`, the reason why the
        contender cannot run here.

    Raises:
        UserError: the contender's model does not have as many parameters as ours.
    """
    contender = CONTENDERS[name]
    config = load(overrides)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    stream = BatchStream(dataset, config.sequence_length, config.data_seed)
    shape = shape_of(config, dataset.vocab_size)
    device = find_device(find_ranks())  # also sets threads, and flushes denormal numbers to zero, as in train.py
    dtype = find_dtype(config, device)
    try:
        model, loss = contender.build(shape, config.sequence_length)
    except ImportError as error:
        return {"left_out": f"{contender.package} cannot be imported: {error}"}
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != sum(parameters(shape).values()):
        raise UserError(f"the model of {name} has {count:,} parameters, ours {sum(parameters(shape).values()):,}")
    model.to(device, dtype).train()
    optim = config.optim
    settings = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        rows = torch.from_numpy(stream.samples(step * config.global_batch_size, config.global_batch_size)).to(device)
        objective = loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.item()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parameters": count,
        "version": version(contender.package),
    }
