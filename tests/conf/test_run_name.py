"""The name that a run is given: the same for the same run however it is typed, and another for another."""

from __future__ import annotations

import re

import pytest

from conf.load import load

DISTINCT = [
    [],
    ["ffn=relu"],
    ["steps=7"],
    ["tokens=70000"],
    ["seed=1"],
    ["seed=-1"],
    ["data_seed=1"],
    ["optim.lr=0.01"],
    ["model.vocab_size=8192"],
    ["tokenizer.vocab_size=8192"],
    ["ffn=custom", "ffn.formula=x*2"],
    ["ffn=custom", "ffn.formula=x/2"],
    ["ffn=custom", "ffn.formula=x+2"],
    ["data=text", "data.path=a/b"],
    ["data=text", "data.path=a_b"],
    ["data=text", "data.path=é"],
    ["data=text", "data.path=ü"],
    ["data=jsonl", "data.path=a_b"],
    ["data=blend", "data.parts.a.path=x"],
    ["data=blend", "data.parts.a.path=y"],
    ["data=blend", "data.parts.b.path=x"],
    ["schedule=linear"],
    ["precision=fp32"],
    ["model.qk_norm=true"],
    ["model.tie_embeddings=true"],
    ["prompts=[a,b]"],
    ["prompts=[a_b]"],
]


def test_the_name_of_a_run_tells_commands_apart():
    names = [load(words).run for words in DISTINCT]
    assert len(set(names)) == len(names), sorted(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]{1,80}", name) for name in names), names


@pytest.mark.parametrize(
    "words",
    [
        ["ffn=reglu", "seed=3", "optim.lr=0.001", "data=text", "data.path=a/b"],
        ["ffn=custom", "ffn.formula=gate*up*2", "schedule=wsd", "tokens=1e7"],
    ],
)
def test_the_name_does_not_depend_on_the_order_of_the_words(words):
    assert load(words).run == load(words[::-1]).run == load(words[2:] + words[:2]).run


def test_the_name_is_the_same_for_the_same_values_however_they_are_typed():
    same = [["tokens=1000000"], ["tokens=1e6"], ["+tokens=1.0e6"], ["tokens=5000", "tokens=1e6"]]
    assert len({load(words).run for words in same}) == 1
    assert load(["optim.lr=1e-3"]).run == load(["optim.lr=0.001"]).run
    assert load(["seed=1", "seed=2"]).run == load(["seed=2"]).run != load(["seed=2", "seed=1"]).run
    quoted = ["ffn=custom", "ffn.formula='x*2'"]
    assert load(quoted).run == load(["ffn=custom", "ffn.formula=x*2"]).run
    assert load(["run=mine", "seed=1"]).run == "mine"


def test_what_does_not_change_what_is_learned_does_not_change_the_name():
    free = [
        "zero=2",
        "parallel.timeout_minutes=5",
        "logger=none",
        "micro_batch_size=4",
        "runs=elsewhere",
        "data.workers=1",
    ]
    assert {load([word]).run for word in free} == {load([]).run}


def test_a_long_command_still_has_a_short_name_of_its_own():
    long = [f"ffn.formula=x+{'+'.join(f'{i}*x' for i in range(last))}" for last in (90, 91)]
    names = {load(["ffn=custom", text, "seed=1", "optim.lr=0.012345678"]).run for text in long}
    assert len(names) == 2
    assert all(len(name) <= 80 for name in names)
