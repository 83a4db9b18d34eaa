"""Small models of Transformers with random weights, their gradients, and what their feed-forward layers keep."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.huggingface import patch

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
_KNOWN = dir(transformers)  # without importing them
MODELS = [name for name, (config, _, _) in _MODELS.items() if config in _KNOWN]


def tiny(name: str, **settings: Any) -> nn.Module:
    """Return a model of two layers; without dropout, in training mode."""
    torch.manual_seed(0)
    config, model, more = _MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**{**_COMMON, **more, **settings})).train()


def mlps(model: nn.Module) -> list[Any]:
    """Return the feed-forward layers."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


def tokens(batch: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(run: Any, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits, and the gradients of the mean loss of the next tokens, in float64."""
    model.zero_grad()
    logits = run(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    results = {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).double() for name, value in results.items()
    }


def in_three_ways(name: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return logits and gradients of a model in float64, in `dtype`, and patched in `dtype`."""
    results = []
    for precision, fused in ((torch.float64, False), (dtype, False), (dtype, True)):
        model = tiny(name).to(dtype).to(precision)  # the weights are those of `dtype`, so the computation alone differs
        if fused:
            patch(model)
        results.append(logits_and_gradients(model, model, tokens(16)))
    return results


def error(results: dict[str, Tensor], exact: dict[str, Tensor], names: Iterable[str]) -> float:
    """Return the root mean square of the errors of some tensors, each relative to the tensor's norm."""
    squares = [float(((results[name] - exact[name]).norm() / exact[name].norm()) ** 2) for name in names]
    return (sum(squares) / len(squares)) ** 0.5


def kept_bytes(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return the bytes that a layer keeps for backward, each storage once: without x and with it; parameters never count."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = sizes.pop(x.untyped_storage().data_ptr(), 0)
    return sum(sizes.values()), sum(sizes.values()) + own
