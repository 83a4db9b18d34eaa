"""Runs side by side: settings that differ, losses at equal tokens, speed; in 80 columns."""

from __future__ import annotations

import json

import pytest

from conf.load import load, to_yaml
from kernels.common.errors import UserError
from training.compare import losses_at_equal_tokens, main, read_run


def write_run(
    runs, name: str, losses: dict[int, float], evaluations: dict[int, float], *arguments: str, held_out: int = 128
):
    """Write a run folder: {step: loss} of 100 tokens per step."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load([f"run={name}", f"runs={runs}", "steps=40", *arguments])))
    lines = [
        {
            "kind": "train",
            "step": step,
            "tokens": 100 * step,
            "loss": loss,
            "tokens_per_second": 1000.0 * step,
            "mfu": None,
        }
        for step, loss in losses.items()
    ]
    for step, loss in evaluations.items():
        lines.append({"kind": "eval", "step": step, "tokens": 100 * step, "loss": loss, "held_out_tokens": held_out})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three runs: the second with another arm and every other step logged, the third still in progress."""
    write_run(tmp_path, "one", {1: 5.0, 2: 4.0, 3: 3.5, 4: 3.0}, {2: 4.1, 4: 3.1})
    write_run(tmp_path, "two", {2: 4.2, 4: 3.4}, {2: 4.0, 4: 3.0}, "ffn=relu2", "optim.lr=0.1", "log_every=2")
    write_run(tmp_path, "three", {1: 5.0, 2: 4.5}, {2: 4.4})
    summary = {"status": "finished", "final_eval_loss": 3.05, "wall_seconds": 125.0, "provenance": {"commit": "a" * 40}}
    (tmp_path / "one" / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_settings_losses_and_speed_are_printed_in_80_columns(runs, capsys):
    assert main(["one", "two", str(runs / "three"), f"runs={runs}", "points=2"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines()]
    assert ["optim.lr", "0.004", "0.1", "0.004"] in rows
    assert ["log_every", "1", "2", "1"] in rows
    assert ["200", "4.1000", "4.0000", "(-0.1000)", "4.4000", "(+0.3000)"] in rows
    assert ["200", "4.0000", "4.2000", "(+0.2000)", "4.5000", "(+0.5000)"] in rows
    assert ["tokens/s,", "median", "3k", "4k", "2k"] in rows
    assert ["state", "finished", "unfinished", "unfinished"] in rows
    assert ["wall-clock", "time", "2m", "05s", "–", "–"] in rows
    assert "MFU" not in out  # no run has measured it
    assert "python -m ablation.run compares arms" in " ".join(out.split())


def test_a_loss_between_two_measurements_is_marked(runs):
    one, two = read_run(runs / "one"), read_run(runs / "two")
    rows = losses_at_equal_tokens([one, two], "train", points=3)
    assert rows == [
        ("200", ["4.0000", "4.2000 (+0.2000)"]),
        ("300", ["3.5000", "~3.8000 (+0.3000)"]),
        ("400", ["3.0000", "3.4000 (+0.4000)"]),
    ]


def test_losses_on_other_held_out_text_do_not_compare(runs, capsys):
    write_run(runs, "other", {2: 4.0}, {2: 4.0}, held_out=999)
    main(["one", "other", f"runs={runs}"])
    assert "or other numbers of held-out tokens" in " ".join(capsys.readouterr().out.split())


def test_another_tokenizer_is_pointed_out(runs, capsys):
    write_run(runs, "other", {2: 4.0}, {2: 4.0}, "tokenizer.vocab_size=512")
    main(["one", "other", f"runs={runs}"])
    assert "losses per token do not compare; bits per byte do" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["one"], "name two or more runs"),
        (["one", "nowhere"], "there is no run 'nowhere'"),
        (["one", "two", "point=3"], "unknown option 'point': did you mean 'points'"),
        (["one", "two", "points=0"], "points=0 must be at least 1"),
        (["one", "new"], "has no metrics.jsonl: it has not taken a step yet"),
    ],
)
def test_bad_input_is_one_sentence(runs, arguments, sentence):
    (runs / "new").mkdir()
    (runs / "new" / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        main([*arguments, f"runs={runs}"])
