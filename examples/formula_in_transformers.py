"""Your formula in a Hugging Face model: `python examples/formula_in_transformers.py`. About a minute on a laptop CPU.

A small random Llama learns the bytes of Python's `argparse` module three times: as Transformers builds it, with its own
activation fused (the same losses, up to rounding), and with a formula that no library has. Needs torch and Transformers; from
this project only the package `formula_ffn` (`pip install .`).
"""

from __future__ import annotations

import argparse
import inspect
import time

import formula_ffn  # pyright: ignore[reportMissingImports]  # an editable install is found when it runs, not before
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FORMULA = "gate*atan(gate) * up"
BATCH, LENGTH = 8, 128


def new_model() -> LlamaForCausalLM:
    """Return the same small random Llama every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def kept_for_backward(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the MiB of activations that autograd keeps between forward and backward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens, labels=tokens)
    assert output.loss.requires_grad
    return sum(kept.values()) / 2**20


def train(model: LlamaForCausalLM, text: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Return the loss of each step, and seconds per step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)  # the same batches for every model
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        tokens = torch.stack([text[start : start + LENGTH] for start in starts])  # (B, S)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    models = {"as Transformers builds it": new_model(), "its own activation, fused": new_model(), FORMULA: new_model()}
    print(formula_ffn.patch(models["its own activation, fused"]))
    print(formula_ffn.patch(models[FORMULA], FORMULA))

    print(f"\n{'':<28}{'loss, first':>12}{'loss, last':>12}{'MiB kept':>10}{'ms per step':>13}")
    first_of: dict[str, float] = {}
    for name, model in models.items():
        kept = kept_for_backward(model, text[: BATCH * LENGTH].view(BATCH, LENGTH))
        losses, seconds = train(model, text, steps)
        first_of[name] = losses[0]
        last = sum(losses[-10:]) / len(losses[-10:])
        print(f"{name:<28}{losses[0]:>12.5f}{last:>12.4f}{kept:>10.1f}{1000 * seconds:>13.1f}")
    difference = abs(first_of["its own activation, fused"] - first_of["as Transformers builds it"])
    print(
        f"\nThe fused model's first loss differs by {difference:.1e}. One seed and one learning rate: which formula is"
    )
    print("better is not answered here. examples/question_to_verdict.py shows what answering takes.")


if __name__ == "__main__":
    main()
