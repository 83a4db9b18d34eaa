"""The text of `train.py --help`, from the schema: groups with their choices, then every key with its help."""

from __future__ import annotations

import dataclasses
import typing

from conf.keys import choices, keys
from conf.schema import GROUPS, Config

EXAMPLES = """\
  deepspeed train.py ffn=swiglu                             the default run: a small model on the standard library's text
  deepspeed --num_gpus 2 train.py ffn=reglu zero=2          two data-parallel ranks (on a CPU too)
  python train.py ffn=custom ffn.formula='x*sigmoid(1.702*x)'
  python train.py data=text data.path=notes/ steps=500
  python train.py --multirun ffn=relu,swiglu seed=0,1       four runs in sequence, without a comparison
  deepspeed train.py model=llama_1b data=parquet data.path=fineweb/ tokenizer=huggingface tokenizer.path=tokenizer.json\
"""


def print_help(program: str) -> None:
    """Print usage, examples, the groups with their choices, and every key with its default and help."""
    types = typing.get_type_hints(Config)
    print(f"usage: {program} GROUP=CHOICE ... key=value ...\n")
    if program == "train.py":
        print(f"Trains a LLaMA-style decoder. The same command again resumes a stopped run.\n\nexamples\n{EXAMPLES}\n")
    print("groups")
    for group in GROUPS:
        print(f"  {group + '=':<12}{' | '.join(choices(group))}")
    section = None  # the group whose keys are being printed
    for name, _, field in keys():
        group = name.rpartition(".")[0]
        if group != section:
            section = group
            print(f"\n{types[group].__doc__.strip() if group else 'keys'}")
        print(f"  {f'{name}={_default(field)}':<44}{field.metadata['help']}")
    print(
        f"\n{program} --cfg prints the composed configuration. A preset (model=...) sets its own values of these keys."
    )


def _default(field: dataclasses.Field) -> str:
    """Return a key's default as it is typed."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is None:
        return "null"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
