"""The end of a run: weights that are kept whatever fails, figures that are withheld, and lengths that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.load import load
from kernels.common.json_files import read_document_losses
from tests.training.tiny import newest_intact, overrides, write_corpus
from training.recorder import RunRecorder


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def lines_of(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def train(no_group):
    """A function that runs train.py and returns its status and output."""

    def run(arguments: list[str], fault: str | None = None) -> dict:
        return no_group.run("command", module="train", arguments=arguments, fault=fault)[0]

    return run


@pytest.mark.parametrize("fault", ["evaluation", "sampling"])
def test_a_failure_after_the_last_step_costs_no_weights(train, corpus, tmp_path, fault):
    arguments = overrides(corpus, tmp_path, run="a", steps=2, eval_every=0, save_every=0)
    result = train(arguments, fault)
    assert result["status"] == 1
    assert "RuntimeError: a bug, or a lack of memory" in result["err"]
    path, damaged = newest_intact(tmp_path / "a" / "checkpoints")
    assert (path and path.name, damaged) == ("step_00000002", [])
    assert summary(tmp_path / "a")["status"] == "failed"
    assert train(arguments)["status"] == 0  # only what failed is done again
    assert summary(tmp_path / "a")["status"] == "finished"
    losses = read_document_losses(tmp_path / "a")
    assert sum(losses.nats) / sum(losses.tokens) == pytest.approx(summary(tmp_path / "a")["final_eval_loss"], rel=1e-6)
    assert len(lines_of(tmp_path / "a", "train")) == 2
    assert losses.step == 2
    assert (tmp_path / "a" / "samples.txt").read_text().startswith("-")


def test_without_held_out_text_a_run_is_trained_and_says_so(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=4, eval_every=2, eval_tokens=64, data__held_out=0)
    result = train(arguments)
    assert result["status"] == 0, result
    assert "warning: no text of this corpus is held out: the run is trained without evaluation" in result["out"]
    assert "none held out" in result["out"]
    assert "held-out text: none, the run was trained without evaluation" in result["out"]
    assert (summary(tmp_path / "a")["status"], summary(tmp_path / "a")["final_eval_loss"]) == ("finished", None)
    assert lines_of(tmp_path / "a", "eval") == []
    assert newest_intact(tmp_path / "a" / "checkpoints")[0]
    assert "there is nothing to do" in train(arguments)["out"]
    assert "data.held_out=0.6" in train([*arguments, "data.held_out=0.6"])["err"]


def test_bits_per_byte_are_withheld_where_the_tokenizer_loses_text(train, tmp_path):
    write_corpus(tmp_path / "own" / "corpus", files=8)
    characters = {character: number for number, character in enumerate("abcdefghij \n")}  # the others are lost
    model = {"type": "BPE", "vocab": characters | {"<|endoftext|>": len(characters)}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    lossy = {"tokenizer": "huggingface", "tokenizer.path": tmp_path / "tokenizer.json", "tokenizer.vocab_size": None}
    result = train(overrides(tmp_path / "own", tmp_path / "runs", run="a", steps=2, **lossy))
    assert result["status"] == 0, result
    reason = r"bits per byte are withheld: the tokenizer does not give back the text of \d of \d held-out documents"
    assert re.search(f"warning: {reason}", result["out"])
    assert re.search(rf"nats per token; {reason}\n", result["out"])
    assert "bits per byte (" not in result["out"]
    ended = summary(tmp_path / "runs" / "a")
    assert ended["final_eval_loss"] > 0
    assert ended["bits_per_byte"] is None
    assert ended["bits_per_byte_withheld"].startswith("the tokenizer does not give back")
    assert all("bits_per_byte" not in line for line in lines_of(tmp_path / "runs" / "a", "eval"))


def test_a_corpus_repeated_too_often_is_refused_before_training(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", data__max_epochs=None)
    result = train([*arguments, "steps=4000"])
    assert (result["status"], result["joined"]) == (2, False)
    found = re.search(r"this run would go ([\d.]+) times through text \([\d,]+ training tokens\), and "
                      r"data.max_epochs=4: .* set data.max_epochs=(\d+)$", result["err"].strip())  # fmt: skip
    assert found
    assert float(found[1]) <= int(found[2]) < float(found[1]) + 1
    parts = {"a": {"path": str(corpus / "corpus"), "source": "text", "weight": 1}}
    parts["b"] = parts["a"] | {"path": str(corpus / "corpus" / "000.txt"), "weight": 1}
    words = [f"data.parts.{name}.{key}={value}" for name, part in parts.items() for key, value in part.items()]
    blend = [word for word in arguments if not word.startswith("data")]
    blend = ["data=blend", f"data.prepared={tmp_path / 'p'}", *words, *blend, "steps=100"]
    assert "times through b (" in train(blend)["err"]


def test_a_run_that_resumes_is_not_refused_for_its_length_again(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=2)
    assert train(arguments)["status"] == 0
    (tmp_path / "a" / "summary.json").unlink()
    assert train([*arguments, "data.max_epochs=0.001"])["status"] == 0
    result = train([*arguments, "data.max_epochs=0.001", "steps=3"])
    assert (result["status"], "data.max_epochs=0.001" in result["err"]) == (2, True)


@pytest.mark.parametrize(
    ("began", "config", "advised"),
    [
        ("optim=muon run=a tokens=5M ffn.save=input", ["optim=muon", "tokens=5M"], "optim=muon tokens=5M"),
        ("++seed=3 resume_from=step_1", ["seed=3"], "++seed=3"),
        ("steps=40 run=a-swap-reglu", ["steps=40", "ffn=reglu"], "steps=40"),
    ],
)
def test_another_arm_is_advised_with_what_was_typed_for_training(tmp_path, began, config, advised):
    assert advice(tmp_path, f"python -u code/train.py {began}", config) == f"deepspeed train.py ffn=relu2 {advised}"


@pytest.mark.parametrize(
    ("began", "config"),
    [
        ("python -m model.swap run=a ffn=reglu swap.steps=20", []),
        ("python train.py steps=40 run=a-swap-reglu", ["steps=40", "model.d_model=96", "model.n_heads=2"]),
        ("python train.py steps=40 model.d_ff=300", ["steps=40", "model.d_ff=300"]),
        ("python train.py 'seed=3", []),
        ("python train.py model=nanno", []),
    ],
)
def test_no_arm_is_advised_where_more_than_that_would_differ(tmp_path, began, config):
    assert advice(tmp_path, began, config) == ""


def advice(folder: Path, began: str, config: list[str]) -> str:
    (folder / "provenance.json").write_text(json.dumps([{"command": began}, {"command": "python train.py run=a"}]))
    recorder = SimpleNamespace(folder=SimpleNamespace(path=folder), config=load(config))
    return RunRecorder._with_another_arm(recorder)
