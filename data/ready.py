"""Say whether the corpora of runs are tokenized, and refuse a run that would repeat its corpus too often.

Its own command, because `launch` and `ablation` import nothing of `data`: they call it before a job is submitted.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from conf.load import load
from conf.schema import Config, DataConfig
from conf.validate import total_steps
from data.batches import open_dataset, refuse_repetition
from data.documents import most_bytes
from data.folder import folder_of
from data.prepare import prepare
from data.shards import INDEX
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options

MOST_TOKENS_PER_BYTE = 4  # more than any tokenizer makes: one that knows nothing makes a token of each byte

USAGE = """
usage: python -m data.ready [prepare=true] KEY=VALUE ... [-- KEY=VALUE ...]

Prints "ready" or "not prepared" for each run, given by the overrides of train.py and separated by --. With prepare=true it
first tokenizes what is not prepared. It fails if a tokenizer or a corpus is missing, or if a new run would go through its
corpus more often than data.max_epochs.
"""


def is_ready(config: Config) -> bool:
    """Return whether the corpus of a run is tokenized.

    Raises:
        UserError: its files, or those of the tokenizer, are missing or do not fit each other, or the run would repeat it
            too often.
    """
    folder = folder_of(config.data, config.tokenizer)
    prepared, steps = (folder / INDEX).is_file(), total_steps(config)
    resumed = any(Path(config.runs, str(config.run), "checkpoints").glob("step_*"))
    if steps is not None and not resumed:  # a run that resumes knows how long it was to be
        samples = steps * config.global_batch_size
        if prepared:
            refuse_repetition(open_dataset(folder), config.sequence_length, samples, config.data.max_epochs)
        else:
            _refuse_hopeless(config.data, samples * config.sequence_length)
    return prepared


def _refuse_hopeless(data: DataConfig, tokens: int) -> None:
    """Refuse a run that would repeat its corpus too often whatever the tokenizer, before somebody tokenizes it.

    Raises:
        UserError: it would.
    """
    size = most_bytes(data)
    if size is None:
        return
    least = tokens / (MOST_TOKENS_PER_BYTE * max(1, size))
    if least > data.max_epochs:
        raise UserError(
            f"this run would go more than {least:,.0f} times through {data.name} ({size:,} bytes of text), and "
            f"data.max_epochs={data.max_epochs:g}: give it more text (data=text data.path=FOLDER), or fewer tokens=N"
        )


def main(argv: list[str]) -> int:
    options, argv = split_options(argv, {"prepare": False})
    for separator, overrides in groupby(argv, lambda word: word == "--"):
        if separator:
            continue
        config = load(list(overrides), program="python -m data.ready")
        if options["prepare"]:
            prepare(config.data, config.tokenizer, show=True)
        print("ready" if is_ready(config) else "not prepared")
    return 0


if __name__ == "__main__":
    run_command(main, USAGE, needs_arguments=True)
