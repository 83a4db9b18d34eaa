"""What is known of the corpora of runs before their jobs wait for nodes."""

from __future__ import annotations

import gzip

import pytest

from ablation.slurm import _longest_on_each_corpus
from conf.load import load
from data.ready import main
from kernels.common.errors import UserError
from launch.corpus import unprepared
from tests.ablation.made import plan_of
from tests.data.conftest import look_here


@pytest.fixture
def words(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(400)))
    data = ["data=text", f"data.path={tmp_path}/a.txt", f"data.prepared={tmp_path}/p", "tokenizer.vocab_size=300"]
    return [*data, f"runs={tmp_path}", "run=x", "sequence_length=64", "global_batch_size=4"]


@pytest.fixture(autouse=True)
def _looked_at_here(monkeypatch, capsys):
    look_here(monkeypatch, capsys)


def test_each_run_is_told_of_and_prepared_where_asked(words, capsys):
    short, other = [*words, "tokens=1k"], [*words, "tokens=1k", "data.held_out=0.01"]
    assert main([*short, "--", *other]) == 0
    assert capsys.readouterr().out.splitlines() == ["not prepared"] * 2
    assert main(["prepare=true", *words, "tokens=1k"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"
    assert unprepared([short, other]) == [other]
    with pytest.raises(UserError, match=r"data\.max_epochs=4"):
        unprepared([short, [*words, "tokens=1M"]])
    with pytest.raises(UserError, match="missing"):
        unprepared([[*words, "data.path=/missing"]])


def test_a_run_that_no_tokenizer_can_feed_is_refused_before_its_corpus_is_tokenized(words, tmp_path):
    size = (tmp_path / "a.txt").stat().st_size
    assert unprepared([[*words, f"tokens={4 * size}"]])  # perhaps once
    with pytest.raises(UserError, match=rf"more than 5 times through text \({size:,} bytes of text\), .*max_epochs=4:"):
        unprepared([[*words, f"tokens={20 * size}"]])
    assert unprepared([[*words, f"tokens={20 * size}", "data.max_epochs=6"]])
    with pytest.raises(UserError, match=r"more than [\d,]{5,} times through stdlib"):
        unprepared([["model=llama3_8b", f"data.prepared={tmp_path}/p", f"runs={tmp_path}", "run=y"]])
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:  # its size says nothing
        file.write((tmp_path / "a.txt").read_bytes())
    assert unprepared([[*words, f"data.path={tmp_path}/b.txt.gz", f"tokens={20 * size}"]])


def test_of_a_plan_the_longest_run_on_each_corpus_is_looked_at(tmp_path):
    sizes = "{short: tokens=100k, long: tokens=300k, other: tokens=200k data.held_out=0.1}"
    plan = plan_of("ablation=smoke", "ablation.rates=[1]", "ablation.common=[]", f"ablation.sizes={sizes}")
    lengths = [load(run).tokens for run in _longest_on_each_corpus(plan, tmp_path)]
    assert lengths == [300_000, 200_000]
