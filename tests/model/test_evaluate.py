"""Benchmarks of a run: local tasks need no network, and measure what the run computes; and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

from kernels.common.errors import UserError
from model import evaluate as command
from model.evaluate import main, table
from model.generate import load_run

DOCUMENTS = [f"def f{i}(x):\n    return {i * 'value '}" for i in range(6)]
CHOICES = [" return", " index", "\n\n"]


def log_likelihood(run, ids: list[int], first: int) -> float:
    """Return the log-likelihood in nats of ids[first:] in a document."""
    model, tokenizer, _ = load_run(run)
    tokens = torch.tensor([[tokenizer.eos_id, *ids]])
    with torch.inference_mode():
        scores = model(tokens)[0].log_softmax(-1)
    return sum(scores[i, tokens[0, i + 1]].item() for i in range(first, len(ids)))


@pytest.fixture
def harness(transformers, tmp_path, monkeypatch):
    """The harness, without a network; its cache of data sets lies in a folder of the test."""
    assert transformers
    pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")
    pytest.importorskip("accelerate", reason="needs pip install '.[eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"text": text, "choices": CHOICES, "answer": i % 3} for i, text in enumerate(DOCUMENTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    shared = data | {"test_split": "test", "metadata": {"version": 1}}
    bits = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    bits["metric_list"] = [{"metric": "bits_per_byte"}]
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}"}
    choice |= {"target_delimiter": "", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    for name, task in (("local_bits", bits), ("local_choice", choice)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | shared | task))
    return folder


@pytest.mark.usefixtures("harness")
def test_local_tasks_measure_what_the_run_computes(make_run, tasks, capsys):
    run = make_run("swish")
    main([f"run={run}", "tasks=local_bits,local_choice", f"include={tasks}", "batch_size=3"])
    (path,) = (run / "evaluations").iterdir()
    assert path.name == "step_00000007-local_bits+local_choice.json"
    written = json.loads(path.read_text())
    assert (written["run"], written["step"], written["limit"]) == ("run", 7, None)
    tokenizer = load_run(run)[1]
    nats = sum(log_likelihood(run, tokenizer.encode(text), 0) for text in DOCUMENTS)
    expected = -nats / math.log(2) / sum(len(text.encode()) for text in DOCUMENTS)
    assert written["results"]["local_bits"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    right = 0
    for i, text in enumerate(DOCUMENTS):
        first = len(tokenizer.encode(text.rstrip()))  # the space before an answer counts as the answer's
        scores = [log_likelihood(run, tokenizer.encode(text + choice), first) for choice in CHOICES]
        right += scores.index(max(scores)) == i % 3
    assert written["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    output = capsys.readouterr().out
    assert "local_choice" in output
    assert f"{expected:.4f}" in output
    assert str(path) in output


@pytest.mark.usefixtures("harness")
def test_a_few_examples_of_a_task_and_a_file_of_ones_own(make_run, tasks, tmp_path):
    arguments = ["limit=2", "num_fewshot=1", f"output={tmp_path / 'new' / 'results.json'}"]
    data = yaml.safe_load((tasks / "local_choice.yaml").read_text())
    (tasks / "local_choice.yaml").write_text(yaml.safe_dump(data | {"fewshot_split": "test"}))
    main([f"run={make_run()}", "tasks=local_choice", f"include={tasks}", *arguments])
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["n-samples"]["local_choice"]["effective"] == 2
    assert written["n-shot"]["local_choice"] == written["num_fewshot"] == 1


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tasks=local_bit"], "unknown task 'local_bit': did you mean 'local_bits'?"),
        (["tasks=local_bits", "step=3"], "has no checkpoint of step 3"),
        (["tasks=local_gone"], "the data of local_gone is not available"),
        (["tasks=local_bits", "include=nowhere"], "include=nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(make_run, tasks, arguments, sentence):
    data = yaml.safe_load((tasks / "local_bits.yaml").read_text())
    data |= {"task": "local_gone", "dataset_kwargs": {"data_files": {"test": str(tasks / "gone.jsonl")}}}
    (tasks / "local_gone.yaml").write_text(yaml.safe_dump(data))
    run = make_run()
    with pytest.raises(UserError) as caught:
        main([f"run={run}", f"include={tasks}", *arguments])
    assert sentence in str(caught.value)
    assert not (run / "evaluations").exists()


@pytest.mark.usefixtures("harness")
def test_answers_are_generated_by_a_model_that_is_shorter_than_they_may_be(make_run, tasks, capsys):
    data = yaml.safe_load((tasks / "local_choice.yaml").read_text())
    data |= {"task": "local_answer", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
    del data["doc_to_choice"]
    data |= {"generation_kwargs": {"until": ["return"]}, "metric_list": [{"metric": "exact_match"}]}
    (tasks / "local_answer.yaml").write_text(yaml.safe_dump(data))
    run = make_run()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"sequence_length": 64}))
    assert main([f"run={run}", "tasks=local_bits,local_answer", f"include={tasks}"]) == 0
    assert "local_answer" in capsys.readouterr().out


# ---- without the harness


class Harness:
    """Evaluates tasks that fail by their names."""

    def simple_evaluate(self, tasks, **_):
        (task,) = tasks
        if task == "gone":
            raise FileNotFoundError("gone.jsonl\nmore")
        if task == "broken":
            raise AssertionError("its own fault")
        return {"results": {task: {"acc,none": 0.5}}, "n-shot": {task: 0}}


def test_results_of_tasks_that_ended_are_kept_beside_the_reasons_of_others(make_run, monkeypatch, capsys):
    monkeypatch.setattr(command, "_harness", Harness)
    monkeypatch.setattr(command, "_tasks", lambda *_: None)
    monkeypatch.setattr(command, "_harness_model", lambda *_: None)
    monkeypatch.setattr(command.importlib.metadata, "version", lambda _: "0")
    run = make_run()
    assert main([f"run={run}", "tasks=first,gone,broken,last"]) == 1
    (path,) = (run / "evaluations").iterdir()
    written = json.loads(path.read_text())
    assert list(written["results"]) == ["first", "last"]
    assert written["failed"]["gone"] == "the data of gone is not available: gone.jsonl"
    assert "error: broken failed: AssertionError: its own fault" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"gone\.jsonl; broken failed"):
        main([f"run={run}", "tasks=gone,broken"])


@pytest.mark.parametrize(
    ("settings", "length", "expected"),
    [
        ({}, 128, 64),
        ({}, 1024, 256),
        ({"max_gen_toks": 2048, "until": ["."]}, 2048, 1024),
        ({"max_new_tokens": 16}, 128, 16),
        ({"max_tokens": 500}, 1, 1),
    ],
)
def test_an_answer_takes_at_most_half_of_the_length(settings, length, expected):
    shortened = command._shortened(settings, 256, length)
    assert shortened["max_gen_toks"] == expected
    assert shortened.get("until") == settings.get("until")
    assert "max_new_tokens" not in shortened


def test_what_is_not_installed_is_named(make_run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    monkeypatch.setitem(__import__("sys").modules, "accelerate", __import__("json"))
    with pytest.raises(UserError, match=r"^evaluation needs the package lm_eval: pip install '\.\[eval\]'$"):
        main([f"run={make_run()}", "tasks=arc_easy"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=run"], "missing tasks=TASK,..., such as tasks=arc_easy,hellaswag"),
        (["tasks=a"], "missing run=NAME, the run to evaluate"),
        (["run=none", "tasks=a"], "there is no run 'none'"),
        (["task=a"], "unknown option 'task': did you mean 'tasks'?"),
        (["limit=some"], "limit=some: expected a whole number of at least 0"),
        (["batch_size=0"], "batch_size=0: expected a whole number of at least 1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, sentence, tmp_path):
    with pytest.raises(UserError) as caught:
        main([*arguments, f"runs={tmp_path}"])
    assert sentence in str(caught.value)


def test_the_table_has_a_line_for_each_metric():
    metrics = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    rows = table({"results": {"arc": metrics}, "n-shot": {"arc": 5}})
    assert [list(column.cells) for column in rows.columns] == [
        ["arc", "arc"],
        ["5", "5"],
        ["acc", "em (strict)"],
        ["0.5000", "0.2500"],
        ["0.0100", ""],
    ]


def test_help_names_every_option():
    printed = command.__doc__
    assert [name for name in command._DEFAULTS if f"{name}=" not in printed] == []
