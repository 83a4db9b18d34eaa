"""A run that goes on: its stored configuration, and what is typed beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.load import flatten, from_yaml, load, to_dict, to_yaml
from conf.validate import validate
from kernels.common.errors import UserError


@pytest.fixture
def started(tmp_path) -> Path:
    """The folder of runs in which a run `first` has started."""
    words = [
        "run=first",
        f"runs={tmp_path}",
        "data=text",
        "data.path=notes",
        "ffn=custom",
        "ffn.formula=b*x",
        "steps=50",
    ]
    words += ["ffn.parameters.b=2", "schedule=wsd", "schedule.warmup=0.1", "ffn.per_layer={0: relu2}", "optim.lr=0.1"]
    run = tmp_path / "first"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(load(words)), encoding="utf-8")
    (run / "metrics.jsonl").write_text("")
    return tmp_path


def changes(started: Path, *words: str) -> dict[str, object]:
    """Return the keys in which `run=first` with these words differs from the stored configuration."""
    before = flatten(to_dict(from_yaml(started / "first" / "config.yaml")))
    now = flatten(to_dict(load(["run=first", f"runs={started}", *words])))
    return {key: now.get(key) for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["steps=100"], {"steps": 100}),
        (["tokens=1M"], {"steps": None, "tokens": 10**6}),
        (["zero=2", "data.workers=1"], {"zero.stage": 2, "data.workers": 1}),
        (["logger=none"], {"logger.name": "none", "logger.wandb": False}),
        (["schedule=wsd", "model=nano", "data=text"], {}),  # the run's own choices
        (["ffn.parameters.b=3"], {"ffn.parameters.b": 3}),
        (["ffn.per_layer.1=gelu"], {"ffn.per_layer.1": "gelu"}),
        (["ffn.formula=b*x*x"], {"ffn.formula": "b*x*x"}),
        (["model=nano", "optim.lr=0.2"], {"optim.lr": 0.2}),
    ],
)
def test_a_run_goes_on_from_its_own_configuration(started, words, expected):
    assert changes(started, *words) == expected


@pytest.mark.parametrize(
    ("begun", "words", "expected"),
    [
        (["zero=offload"], ["zero=3"], {"zero.offload_optimizer": False, "zero.offload_parameters": False}),
        (["zero=3"], ["zero=offload"], {"zero.offload_optimizer": True, "zero.offload_parameters": True}),
        (["zero=offload", "zero.overlap=true"], ["zero=offload"], {}),
        (["zero=3", "zero.offload_optimizer=true"], ["zero=3"], {}),
        (["guard.spike=skip"], ["guard=default"], {}),
        (["data=text", "data.path=notes", "data.name=mine"], ["data=text"], {}),
        (["tokenizer.kind=huggingface", "tokenizer.path=t.json"], ["tokenizer=sentencepiece"],
         {"tokenizer.kind": "sentencepiece", "tokenizer.path": None}),
    ],
)  # fmt: skip
def test_a_choice_replaces_that_of_the_run_unless_it_is_the_same_one(tmp_path, begun, words, expected):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(to_yaml(load(["run=first", f"runs={tmp_path}", *begun])))
    (tmp_path / "first" / "metrics.jsonl").touch()
    assert changes(tmp_path, *words) == expected


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [("resume_optimizer", "fresh", "keep"), ("resume_from", "step_2", None), ("resume", False, True)],
)
def test_how_to_resume_is_said_each_time(started, key, before, now):
    path = started / "first" / "config.yaml"
    config = from_yaml(path)
    setattr(config, key, before)
    path.write_text(to_yaml(config))
    assert getattr(load(["run=first", f"runs={started}"]), key) == now
    if before:  # resume=false does not read the stored configuration
        assert getattr(load(["run=first", f"runs={started}", f"{key}={before}"]), key) == before


def test_samples_stay_left_out(started):
    path = started / "first" / "config.yaml"
    path.write_text(path.read_text().replace("skip_samples: null", "skip_samples: '20:24'"))
    assert load(["run=first", f"runs={started}"]).guard.skip_samples == "20:24"


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("s3://bucket/web/**/*.jsonl.gz", "s3://bucket/web/**/*.jsonl.gz"),
        ("https://a.org/t?x=1&token=$MY_TOKEN", "https://a.org/t?x=1&token=$MY_TOKEN"),
        ("[hf://datasets/a/b@main,more/]", ["hf://datasets/a/b@main", "more/"]),
    ],
)
def test_a_url_stays_as_it_was_typed_also_in_a_run_that_goes_on(tmp_path, typed, url):
    words = ["run=first", f"runs={tmp_path}"]
    config = load([*words, "data=text", f"data.path={typed}"])
    validate(config, 1)
    assert config.data.path == url
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "first" / "metrics.jsonl").touch()
    assert load(words).data.path == url


def test_another_choice_replaces_what_it_sets(started):
    assert changes(started, "ffn=relu") == {
        "ffn.formula": "relu(x)", "ffn.from_output": "where(h > 0, 1, 0)", "ffn.name": "relu",
        "ffn.parameters": {}, "ffn.parameters.b": None, "ffn.per_layer": {}, "ffn.per_layer.0": None,
    }  # fmt: skip
    assert changes(started, "model=llama_60m")["optim.lr"] == load(["model=llama_60m"]).optim.lr


def test_a_key_without_effect_on_the_stored_run_is_refused(started):
    load(["run=first", f"runs={started}", "schedule.decay=0.3"])
    with pytest.raises(UserError, match=r"^data\.field=y has no effect with data=text"):
        load(["run=first", f"runs={started}", "data.field=y"])


def test_a_run_that_has_not_started_composes_from_the_defaults(started):
    (started / "first" / "metrics.jsonl").unlink()
    assert load(["run=first", f"runs={started}"]).data.name == "stdlib"
    assert load(["run=second", f"runs={started}"]).data.name == "stdlib"
    assert load(["run=" + "x" * 300]).run == "x" * 300  # refused where values are checked
