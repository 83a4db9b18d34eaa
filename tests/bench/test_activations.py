"""bench.activations: its ratios, the options that it refuses, and one small table."""

from __future__ import annotations

import json

import pytest

from bench import activations
from bench.activations import ARMS, _compare, _plan, main
from bench.formulas import formulas
from kernels.common.errors import UserError


def test_every_arm_has_a_formula():
    assert set(ARMS) <= set(formulas())


def test_contenders_run_in_turn_and_warm_up_first():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("ours", "eager", "copy")}
    figures = _compare(calls, rounds=2)
    assert order == ["ours", "eager", "copy"] * 5
    assert set(figures) == {"ours_ms", "eager_ms", "copy_ms", "eager", "copy"}
    low, high = figures["eager"]["range"]
    assert low <= figures["eager"]["median"] <= high


@pytest.mark.parametrize(
    "option",
    ["arms=relu,swoosh", "dtypes=fp16", "rounds=0", "compile=yes", "shapes=12", "shapes=0x4", "speed=1", "arms"],
)
def test_bad_options_are_refused(option):
    with pytest.raises(UserError):
        main([option])


def test_a_table_of_a_small_size(tmp_path, monkeypatch, capsys):
    build = {"kernels": 2, "cores": 1, "parallel": 1.0, "singly": 2.0}
    monkeypatch.setattr(activations, "_build_times", lambda: build)
    out = tmp_path / "table"
    main(["arms=relu,swiglu", "shapes=4x32", "dtypes=bf16", "rounds=2", "compile=0", f"out={out}"])
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["arm"], row["rows"], row["d_ff"]) for row in rows] == [("relu", 4, 32), ("swiglu", 4, 32)]
    assert all(
        row[name]["ours_ms"] > 0 and row[name]["eager"]["median"] > 0
        for row in rows
        for name in ("forward", "backward")
    )
    assert out.with_suffix(".md").read_text().count("| swiglu | 4x32 | bf16 |") == 2
    assert "relu" in capsys.readouterr().out


def test_the_plan_has_numbers():
    assert _plan(activations._DEFAULTS)["shapes"] == [[1024, 5632], [4096, 2816]]
