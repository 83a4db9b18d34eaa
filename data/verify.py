"""Check every byte of a prepared folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from conf.load import load
from data.folder import folder_of
from data.shards import Shard, read_index, read_part, shard_of, shard_problem, token_dtype
from data.tokenizer import load_tokenizer
from data.usage import with_keys
from kernels.common.commands import run_command
from kernels.common.errors import UserError

USAGE = """
usage: python -m data.verify FOLDER
       python -m data.verify KEY=VALUE ...

Reads all of a prepared folder, named by its path or by the overrides of data.prepare, and prints a line per shard. It checks
checksums, sizes and document boundaries, that every token is in the vocabulary, and that the tokenizer is the one that made
the shards. The exit status is 1 if anything is wrong; a sentence names each fault.

  python -m data.verify prepared/stdlib-0a1b2c3d
  python -m data.verify data=text data.path=notes/
"""


def check_shard(folder: Path, shard: Shard, vocab_size: int, eos_id: int) -> str | None:
    """Read all of a shard and return what is wrong with it, or None."""
    dtype = token_dtype(vocab_size)
    if problem := shard_problem(folder, shard, dtype):
        return problem
    tokens = np.fromfile(folder / f"{shard.name}.bin", dtype)
    ends = np.fromfile(folder / f"{shard.name}.idx", "<i8")
    if int(tokens.max()) >= vocab_size:
        return f"{folder / shard.name}.bin holds token {int(tokens.max())}, beyond the vocabulary of {vocab_size}"
    if (np.diff(ends, prepend=0) < 1).any() or int(ends[-1]) != len(tokens):
        return f"{folder / shard.name}.idx does not divide its tokens into documents"
    if not (tokens[ends - 1] == eos_id).all():
        return f"{folder / shard.name}.idx has a document that does not end with the end-of-text token {eos_id}"
    return None


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Check a prepared folder, and the parts of a blend; print a line per shard and return a sentence per problem.

    Raises:
        UserError: there is no readable index to check against.
    """
    folder = Path(folder)
    index = read_index(folder)
    problems = []
    try:
        if load_tokenizer(folder).hash != index["tokenizer_hash"]:
            problems.append(f"the tokenizer in {folder} is not the one that made the shards")
    except UserError as error:
        problems.append(str(error))
    print(f"{'BROKEN' if problems else 'ok':6}  {folder} tokenizer")
    for record in index.get("shards", []):
        shard = shard_of(record)
        problem = check_shard(folder, shard, index["vocab_size"], index["eos_id"])
        state = "BROKEN" if problem else "ok"
        print(f"{state:6}  {folder / shard.name}  {shard.tokens:,} tokens  {shard.documents:,} documents")
        problems += [problem] if problem else []
    for part in index.get("parts", []):
        where = Path(os.path.normpath(folder / part["folder"]))
        part_index = read_part(where)
        problems += verify(where)
        if part_index["tokenizer_hash"] != index["tokenizer_hash"]:
            problems.append(f"the shards in {where} were made with another tokenizer than the one in {folder}")
    return problems


def main(argv: list[str]) -> int:
    """Print a sentence per problem; return 1 if there are any."""
    if len(argv) == 1 and (os.path.isdir(argv[0]) or ("=" not in argv[0] and not argv[0].startswith("-"))):
        folder = Path(argv[0])
    else:
        config = load(argv, program="python -m data.verify")
        folder = folder_of(config.data, config.tokenizer)
    problems = verify(folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print("all files are as they were written")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main, with_keys(USAGE))
