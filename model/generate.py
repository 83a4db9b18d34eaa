"""Continue a prompt: `python -m model.generate run=NAME prompt='def main():'`.

run=NAME         a run by name or by path
prompt=TEXT      the text to continue, as it is (in bash prompt=$'a\\nb' has a newline); none: begin a document
tokens=128       maximum number of new tokens
temperature=0.8  0: always the most likely token
top_k=50         sample from the k most likely tokens; 0: from all
seed=0           of the sampling, below 2^64
step=N           a checkpoint; default: the newest
runs=FOLDER      where run folders are; default: runs
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.identity import changed_settings
from conf.load import find_run, from_yaml
from conf.shape import shape_of
from conf.validate import total_steps
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import read_options
from kernels.common.text import printable
from model.decoder import Cache, Decoder
from model.health import damage
from model.weights import CheckpointReader, checkpoints, load_weights

_DEFAULTS = {"run": "", "prompt": "", "runs": "runs", "step": -1, "tokens": 128}
_DEFAULTS |= {"temperature": 0.8, "top_k": 50, "seed": 0}


def generate(
    logits_of: Callable[[Tensor, Cache], Tensor],
    tokenizer: Tokenizer,
    n_layers: int,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """Return the prompt and its continuation, of at most `tokens` tokens or up to the end of the document.

    Args:
        logits_of: (newest tokens (1, S), cache) -> logits (1, S, V).
        temperature: divides the logits before sampling; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only; 0: from all.
        seed: of the sampling, which is on the CPU: equal logits and seeds give equal text on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    # In training a document starts after the end of another one, or with a begin token.
    written = [tokenizer.start_id, *tokenizer.encode(prompt)]
    cache = Cache(n_layers)
    newest = written
    for _ in range(tokens):
        logits = logits_of(torch.tensor([newest], device=device), cache)[0, -1].float().cpu()
        logits = logits[: tokenizer.vocab_size]  # further rows are padding of the vocabulary
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if 0 < top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            logits = (logits - logits.max()) / temperature  # the largest is 0: no overflow
            token = int(torch.multinomial(torch.softmax(logits, 0), 1, generator=generator))
        if token == tokenizer.eos_id:
            break
        written.append(token)
        newest = [token]
    return tokenizer.decode(written[1:])


def load_run(run: Path, step: int = -1) -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """Return a run's model in fp32 on the CPU, its tokenizer, and the state of the checkpoint.

    Scheduled parameters of its formulas have their values at the step of the checkpoint.

    Args:
        step: of the checkpoint; -1: the newest.

    Raises:
        UserError: there is no checkpoint (of that step), it is damaged, or it is of another run.
    """
    config = from_yaml(run / "config.yaml")
    by_step = {int(path.name.removeprefix("step_")): path for path in checkpoints(run / "checkpoints")}
    if not by_step:
        raise UserError(f"{run} has no checkpoint yet")
    if step >= 0 and step not in by_step:
        raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, sorted(by_step)))}")
    folder = by_step[step if step >= 0 else max(by_step)]
    problem = damage(folder)
    if problem:
        raise UserError(f"checkpoint {folder} is damaged: {problem}")
    tokenizer = load_tokenizer(run / "tokenizer")
    state = CheckpointReader(folder).state
    if (expected := state.get("tokenizer_hash")) is not None and expected != tokenizer.hash:
        raise UserError(f"checkpoint {folder} was trained with another tokenizer than the one in {run / 'tokenizer'}")
    if changed := changed_settings(state.get("settings"), config):
        raise UserError(
            f"checkpoint {folder} was trained with other settings than config.yaml has: {'; '.join(changed)}"
        )
    shape = shape_of(config, tokenizer.vocab_size)
    document_start = tokenizer.eos_id if config.model.mask_documents else None
    # Decoding with a cache does not use the backend; "sdpa" runs on any device.
    model = Decoder(shape, config.model, "sdpa", document_start)
    state = load_weights(model, folder)
    model.set_step(state["step"], state.get("steps") or total_steps(config) or 0)
    return model.eval(), tokenizer, state


def main(argv: list[str]) -> None:
    options = read_options(argv, _DEFAULTS, required={"run": "run=NAME, the run to sample from"})
    if options["seed"] >= 1 << 64:
        raise UserError(f"seed={options['seed']} is not below 2^64")
    if re.search("[\ud800-\udfff]", options["prompt"]):  # bytes that are no UTF-8 arrive as these
        raise UserError("prompt= is not UTF-8: write texts in it")
    model, tokenizer, _ = load_run(find_run(options["run"], options["runs"]), options["step"])
    with torch.inference_mode():
        text = generate(
            lambda tokens, cache: model(tokens, None, cache),
            tokenizer,
            model.shape.n_layers,
            options["prompt"],
            options["tokens"],
            options["temperature"],
            options["top_k"],
            options["seed"],
        )
    print(printable(text) if sys.stdout.isatty() else text)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
