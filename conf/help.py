"""The text of `train.py --help`, from the schema: groups with their choices, then every key with its help."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from conf.keys import choices, keys
from conf.overrides import as_typed
from conf.schema import GROUPS, Config
from kernels.common.usage import fit

EXAMPLES = """\
  deepspeed train.py ffn=swiglu                         # the default run
  deepspeed --num_gpus 2 train.py ffn=reglu zero=2      # two ranks; on CPUs too
  python train.py ffn=custom ffn.formula='x*sigmoid(1.702*x)'
  python train.py data=text data.path=notes/ steps=500  # your own text
  python train.py --multirun ffn=relu,swiglu seed=0,1   # four runs, in turn
  python train.py run=notes steps=1000                  # resumes that run
  deepspeed train.py model=llama_1b data=parquet data.path=fineweb/ \\
      tokenizer=huggingface tokenizer.path=tokenizer.json\
"""


def print_help(program: str, values: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """Print usage, examples, the groups with their choices, and every key with its default and help.

    Args:
        values: {dotted key: value} of a run without overrides, presets included.
        chosen: {group: the choice of that run}.
    """
    types = typing.get_type_hints(Config)
    lines = [f"usage: {program} GROUP=CHOICE ... KEY=VALUE ...", ""]
    if program == "train.py":
        lines += ["Trains a LLaMA-style decoder. The same command again resumes a stopped run.", ""]
        lines += ["examples", EXAMPLES, ""]
    lines.append("groups (* is the default)")
    for group in GROUPS:
        lines.append(f"  {group + '=':<12}{' | '.join(f'{c}*' if c == chosen[group] else c for c in choices(group))}")
    for group in dict.fromkeys(name.rpartition(".")[0] for name, _, _ in keys()):
        lines += ["", types[group].__doc__.strip() if group else "keys, with the values of the default run"]
        lines += key_lines(types[group] if group else Config, f"{group}." if group else "", values)
    lines += [
        "",
        f"{program} --cfg prints the composed configuration. A preset (model=...) sets its own values of these keys.",
    ]
    print(fit("\n".join(lines)))


def key_lines(schema: type, prefix: str, values: Mapping[str, Any] | None = None) -> list[str]:
    """Return a line for each key of a group: the key with its default, and its help.

    Args:
        prefix: the group with a dot; "" lists the keys that are in no group.
        values: {dotted key: value}, instead of the schema's defaults.
    """
    lines = []
    for name, _, field in keys(schema, prefix):
        if prefix or "." not in name:
            typed = f"{name}={_typed((values or {}).get(name, _default(field)))}"
            lines.append(f"  {typed:<44}{'' if len(typed) < 44 else ' '}{field.metadata['help']}")
    return lines


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _typed(value: Any) -> str:
    """Write a value as it is typed; a list that would not fit on its line is only counted."""
    if isinstance(value, list) and value:
        return f"[{','.join(map(str, value))}]" if len(str(value)) < 40 else f"[{len(value)} of them]"
    if isinstance(value, float) and value >= 1e6:
        return f"{value:g}"
    return as_typed(value)
