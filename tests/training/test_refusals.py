"""Bad input: one sentence on standard error, status 2, before any process group exists; existing files stay untouched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.identity import differences
from conf.schema import Config, TokenizerConfig
from tests.training.tiny import PATIENCE, ROOT, command, contents, environment, overrides, write_corpus
from training.run import own_tokenizer


@pytest.fixture(scope="session")
def finished(corpus, no_group, tmp_path_factory) -> Path:
    """A folder with runs of 2 of 4 steps: `a`, and `b` of another model."""
    runs = tmp_path_factory.mktemp("finished")
    for name, width in (("a", 45), ("b", 47)):
        arguments = overrides(corpus, runs, run=name, steps=2, model__d_ff=width, eval_every=0, save_every=1)
        assert no_group.run("command", module="train", arguments=arguments)[0]["status"] == 0
    return runs


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """A copy of the finished runs."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with a corpus for one test only."""
    write_corpus(tmp_path / "own" / "corpus", files=8)
    return tmp_path / "own"


@pytest.fixture
def refuse(no_group):
    """A function that runs train.py and returns the sentence of its refusal; the folder `kept` must not change."""

    def run(arguments: list[str], kept: Path, fault: str | None = None, status: int = 2) -> str:
        before = contents(kept)
        result = no_group.run("command", module="train", arguments=arguments, fault=fault)[0]
        assert result["status"] == status, result
        assert result["joined"] is False
        assert "step 1/" not in result["out"]
        lines = [line for line in result["err"].splitlines() if line.startswith("error: ")]
        others = [line for line in result["err"].splitlines() if line not in lines]
        assert len(lines) == 1, result["err"]
        assert not any("Traceback" in line for line in others)
        after = contents(kept)
        assert {name: data for name, data in after.items() if name in before} == before
        return lines[0].removeprefix("error: ")

    return run


def test_a_missing_file_is_named(refuse, own, tmp_path):
    arguments = overrides(own, tmp_path / "runs", run="r", data__path=own / "missing.txt")
    assert str(own / "missing.txt") in refuse(arguments, own)


def test_an_empty_file_is_named(refuse, own, tmp_path):
    (own / "empty.txt").touch()
    sentence = refuse(overrides(own, tmp_path / "runs", run="r", data__path=own / "empty.txt"), own)
    assert "empty" in sentence


def test_what_is_not_utf8_is_named_with_its_offset(refuse, own, tmp_path):
    (own / "corpus" / "bad.txt").write_bytes(b"good words\n" * 10 + b"\xff\xfe" + b"\nmore words")
    sentence = refuse(overrides(own, tmp_path / "runs", run="r"), own / "corpus")
    assert str(own / "corpus" / "bad.txt") in sentence
    assert "110" in sentence


def test_a_corrected_command_may_reuse_the_name_of_the_refused_one(refuse, no_group, corpus, tmp_path):
    refuse(overrides(corpus, tmp_path / "runs", run="r", data__path=corpus / "typo"), corpus)
    arguments = overrides(corpus, tmp_path / "runs", run="r", steps=1, eval_every=0)
    result = no_group.run("command", module="train", arguments=arguments)[0]
    assert result["status"] == 0, result


def test_a_sequence_beyond_the_text(refuse, corpus, tmp_path):
    sentence = refuse(overrides(corpus, tmp_path / "runs", run="r", sequence_length=10**6), corpus)
    assert sentence.startswith("sequence_length=1000000 is beyond the ")


def test_a_broken_shard_is_named(refuse, no_group, own, tmp_path):
    arguments = overrides(own, tmp_path / "runs", run="r", tokenizer__vocab_size=300)
    assert no_group.run("command", module="data.prepare", arguments=arguments)[0]["status"] == 0
    (shard,) = own.glob("prepared/*/train-00000.bin")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert str(shard) in refuse(arguments, own)


def test_a_tokenizer_that_did_not_make_the_shards(refuse, no_group, corpus, own, tmp_path):
    arguments = overrides(own, tmp_path / "runs", run="r", tokenizer__vocab_size=300)
    assert no_group.run("command", module="data.prepare", arguments=arguments)[0]["status"] == 0
    (ours,), (foreign, *_) = own.glob("prepared/*/tokenizer.model"), corpus.glob("prepared/*/tokenizer.model")
    shutil.copy(foreign, ours)
    sentence = refuse(arguments, own)
    assert sentence.startswith(f"the tokenizer in {ours.parent} is not the one that made the shards")


def test_a_run_of_that_name_with_another_model(refuse, corpus, runs):
    arguments = overrides(corpus, runs, run="a", steps=4, model__d_ff=47, optim__lr=0.5)
    sentence = refuse(arguments, runs)
    assert "other settings (model.d_ff: 45 -> 47; optim.lr: 0.01 -> 0.5)" in sentence


@pytest.mark.parametrize(
    ("width", "layers", "sentence"),
    [
        (47, 2, "of another shape: layers.0.ffn.up is (2, 45, 33) there and (2, 47, 33) here"),
        (45, 3, "of another model: it holds no layers.2.attention_norm.weight"),
        (45, 1, "of another model: it holds layers.1.attention.out, which this one does not have"),
    ],
)
def test_a_checkpoint_of_another_model(refuse, corpus, runs, width, layers, sentence):
    arguments = overrides(corpus, runs, run="c", steps=4, model__d_ff=width, model__n_layers=layers)
    shutil.copytree(runs / "a" / "checkpoints", runs / "c" / "checkpoints")
    assert sentence in refuse(arguments, runs)


def test_a_checkpoint_of_other_text(refuse, runs, own):
    shutil.copytree(runs / "a" / "checkpoints", runs / "c" / "checkpoints")
    tokenizer = runs / "a" / "tokenizer" / "tokenizer.model"
    arguments = overrides(own, runs, run="c", steps=4, tokenizer__path=tokenizer, tokenizer__vocab_size=None)
    assert "was trained on other text" in refuse(arguments, runs)
    arguments = overrides(own, runs, run="d", steps=4)
    shutil.copytree(runs / "a" / "checkpoints", runs / "d" / "checkpoints")
    assert "was trained on other text than what data=" in refuse(arguments, runs)


def test_a_tokenizer_that_moved_with_its_run_is_found_there(tmp_path):
    gone = TokenizerConfig(path=str(tmp_path / "runs" / "a" / "tokenizer" / "tokenizer.model"))
    moved = tmp_path / "elsewhere" / "a"
    assert own_tokenizer(gone, moved) == gone
    (moved / "tokenizer").mkdir(parents=True)
    assert own_tokenizer(gone, moved).path == str(moved / "tokenizer")
    assert own_tokenizer(TokenizerConfig(), moved).path is None
    assert differences(Config(tokenizer=gone), Config(tokenizer=own_tokenizer(gone, moved))) == []
    assert differences(Config(tokenizer=gone), Config()) != []


def test_a_finished_run_without_its_checkpoints_does_not_start_over(refuse, corpus, runs):
    arguments = overrides(corpus, runs, run="a", steps=2, eval_every=0, save_every=1)
    shutil.rmtree(runs / "a" / "checkpoints")
    sentence = refuse(arguments, runs)
    assert sentence.startswith(
        f"{runs / 'a'} holds a run of 2 steps and no checkpoint of it: bring its checkpoints back, "
    )
    for name in ("metrics.jsonl", "summary.json"):  # what is left tells enough
        (runs / "a" / name).unlink()
        assert "and no checkpoint of it: " in refuse(arguments, runs)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(refuse, corpus, runs):
    for path in (runs / "a" / "checkpoints").iterdir():
        (path / "state.json").write_bytes(b"\xff")
    sentence = refuse(overrides(corpus, runs, run="a", steps=2, eval_every=0, save_every=1), runs)
    newest = runs / "a" / "checkpoints" / "step_00000002"
    assert f"can be used (checkpoint {newest} is damaged: state.json has 1 bytes, not" in sentence
    assert sentence.endswith(f"or delete {runs / 'a'} to train it again")


@pytest.mark.parametrize("gone", ["config.yaml", "metrics.jsonl"])
def test_the_settings_are_compared_whichever_file_is_gone(refuse, corpus, runs, gone):
    (runs / "a" / gone).unlink()
    arguments = overrides(corpus, runs, run="a", steps=4, eval_every=0, seed=3)
    assert "other settings (seed: 0 -> 3)" in refuse(arguments, runs)
    assert (runs / "a" / gone).exists() is False  # nor does the refused command leave its own settings there


def test_an_existing_run_without_resume(refuse, corpus, runs):
    sentence = refuse(overrides(corpus, runs, run="a", steps=2, eval_every=0, resume="false"), runs)
    assert "holds a run and resume=false" in sentence


def test_two_runs_in_one_folder(refuse, corpus, runs):
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, runs / "a" / ".lock"],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        sentence = refuse(overrides(corpus, runs, run="a", steps=4, eval_every=0), runs)
        assert sentence.startswith(f"another process is training in {runs / 'a'}: ")
    finally:
        holder.communicate(timeout=PATIENCE)


def test_a_file_where_the_run_folder_should_be(refuse, corpus, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").write_text("mine")
    sentence = refuse(overrides(corpus, tmp_path / "runs", run="r"), tmp_path)
    assert sentence.startswith(f"cannot write to the run folder {tmp_path / 'runs' / 'r'}: a ")
    sentence = refuse(overrides(corpus, tmp_path / "runs" / "r", run="r"), tmp_path)
    assert "a part of that path is a file" in sentence


@pytest.mark.parametrize(("fault", "why"), [("folder refused", "permission denied"), ("read-only", "read-only")])
def test_a_run_folder_that_cannot_be_written(refuse, corpus, tmp_path, fault, why):
    sentence = refuse(overrides(corpus, tmp_path / "runs", run="r"), tmp_path, fault=fault)
    assert re.fullmatch(f"cannot write to the run folder {tmp_path}/runs/r: .*{why}.*", sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_preparing(refuse, own, runs):
    arguments = overrides(own, runs, run="new", tokenizer__vocab_size=301)
    assert "the disk is full" in refuse(arguments, runs, fault="full disk", status=75)


def test_stage_0_in_bf16(refuse, corpus, tmp_path):
    sentence = refuse(overrides(corpus, tmp_path, run="r", zero=0, precision="bf16"), tmp_path)
    assert sentence.startswith("zero=0 with precision=bf16 is incorrect in DeepSpeed")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over_and_named(no_group, corpus, runs):
    newest = runs / "a" / "checkpoints" / "step_00000002"
    data = bytearray((newest / "rank_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "rank_00000.safetensors").write_bytes(data)
    (newest.parent / ".step_00000001.old").mkdir()
    arguments = overrides(corpus, runs, run="a", steps=4, eval_every=0)
    result = no_group.run("command", module="train", arguments=arguments)[0]
    assert result["status"] == 0, result
    assert not list(newest.parent.glob(".step_*"))  # of processes that were killed
    warning = f"warning: checkpoint {newest} is damaged and was skipped: rank_00000.safetensors does not have"
    assert result["out"].startswith(warning)
    assert json.loads((runs / "a" / "summary.json").read_text())["status"] == "finished"


def test_as_a_process_it_is_one_line_and_status_2(corpus, runs):
    before = contents(runs)
    arguments = overrides(corpus, runs, run="a", steps=4, model__d_ff=47)
    result = command(sys.executable, ROOT / "train.py", *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"error: {runs / 'a'} holds a run with other settings")
    assert contents(runs) == before
