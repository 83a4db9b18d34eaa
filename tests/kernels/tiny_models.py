"""Small models of Transformers with random weights, and their gradients on two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kernels.huggingface.patching import patch

VOCABULARY = 128
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Configuration class, model class, and what the configuration needs beside the common sizes.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "Llama with biases": ("LlamaConfig", "LlamaForCausalLM", {"mlp_bias": True}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16}),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16}),
    "Phi-3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "OLMo-2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "GLM-4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 16}),
    "Arcee": ("ArceeConfig", "ArceeForCausalLM", {}),
    "Apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    "Nemotron": ("NemotronConfig", "NemotronForCausalLM", {}),
    "StarCoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "Phi": ("PhiConfig", "PhiForCausalLM", {}),
}
MODELS = [name for name, (config, _, _) in _MODELS.items() if hasattr(transformers, config)]


def tiny(name: str, **settings: Any) -> nn.Module:
    """Return a model of two layers; without dropout, in training mode."""
    torch.manual_seed(0)
    config, model, more = _MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**{**_COMMON, **more, **settings})).train()


def tokens(batch: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(run: Any, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits, and the gradients of the mean loss of the next tokens, in float64."""
    model.zero_grad()
    logits = run(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    results = {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).double()
        for name, value in results.items()
    }


RANK_KINDS = ("ddp", "fsdp", "fsdp of each mlp")


def on_a_rank(rank: int, folder: str) -> None:
    """Compute the gradients of patched models whose batch two ranks share; rank 0 writes them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    half = tokens().chunk(2)[rank]
    for kind in RANK_KINDS:
        model: Any = tiny("Llama")
        patch(model)
        run = model
        if kind == "ddp":
            run = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                if kind == "fsdp of each mlp":
                    fully_shard(layer.mlp)
                fully_shard(layer)
            fully_shard(model)
        for _ in range(2):  # the second time, parameters were resharded before
            results = logits_and_gradients(run, model, half)
        assert len(patch(model)) == 2  # a layer that was sharded can be patched too
        if rank == 0:
            torch.save(results, Path(folder) / kind)
    dist.destroy_process_group()


def expected_on_ranks() -> dict[str, Tensor]:
    """Return what the unpatched model gives for the whole batch, and rank 0's logits."""
    model = tiny("Llama")
    results = logits_and_gradients(model, model, tokens())
    results["logits"] = results["logits"].chunk(2)[0]
    return results
