"""The help of the commands of this room says what they do, and lists the keys that they take."""

from __future__ import annotations

import re

import pytest

import data.prepare
import data.verify
from conf.keys import keys
from conf.schema import DataConfig, TokenizerConfig
from data.usage import with_keys


@pytest.mark.parametrize("command", [data.prepare, data.verify])
def test_help_lists_the_keys_of_data_and_tokenizer_and_no_others(command):
    lines = with_keys(command.USAGE).splitlines()
    assert lines[0].startswith(f"usage: python -m {command.__name__} ")
    listed = [line.split("=")[0].strip() for line in lines if re.match(r"  (data|tokenizer)\.\w+=", line)]
    groups = (("data.", DataConfig), ("tokenizer.", TokenizerConfig))
    assert listed == [name for prefix, schema in groups for name, _, _ in keys(schema, prefix)]
