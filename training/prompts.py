"""Prompts of the samples that a run generates."""

from __future__ import annotations

from conf.schema import Config
from data.batches import Dataset

PYTHON = (
    "import os\n",
    "def read_lines(path):\n    ",
    'class Node:\n    """A node of a binary tree."""\n\n    def __init__(self',
)
_COUNT, _TOKENS = 3, 12  # prompts out of held-out text, and the most tokens of one


def prompts_of(config: Config, dataset: Dataset) -> list[str]:
    """Return the prompts that were typed; else Python for the standard library; else beginnings of held-out documents."""
    if config.prompts is not None:
        return list(config.prompts)
    return list(PYTHON) if config.data.source in ("stdlib", "installed") else _beginnings(dataset)


def _beginnings(dataset: Dataset) -> list[str]:
    """Return the first words of the first held-out documents: at most half of a document, cut between words."""
    held_out, prompts, start = dataset.held_out, [], 0
    for end in (end for of_shard in held_out.iter_document_ends() for end in of_shard.tolist()):
        tokens = held_out.read(start, min(_TOKENS, (end - start) // 2)).tolist()
        text = dataset.tokenizer.decode(tokens).split("\n\n")[0]
        words, _, _ = text.rpartition(" ")
        if text.strip():
            prompts.append(words or text)
        if len(prompts) == _COUNT:
            break
        start = end
    return prompts
