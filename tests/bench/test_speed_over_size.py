"""bench.scaling: the expected curve, the points of its sweeps, refused options, and (slow) its quick form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import scaling
from conf.load import load
from conf.shape import shape_of
from kernels.common.errors import UserError
from launch.estimate.counts import flops_per_token, parameters

ROOT = Path(__file__).parents[2]
SWEEPS = scaling.sweeps(quick=True)


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does 1e9 FLOP/s per rank, half of them in other processes; the second of two ranks has less to do."""

    def on_ranks(world: int, _: str, arguments: list[str]) -> list[tuple[list[float], list[float]]]:
        config = load(arguments[1:])
        flops = sum(flops_per_token(shape_of(config), config.sequence_length).values())
        seconds = config.global_batch_size * config.sequence_length * flops / 1e9 / world
        steps = int(arguments[0])
        return [([seconds / (rank + 1)] * steps, [seconds / (rank + 1) / 2] * steps) for rank in range(world)]

    monkeypatch.setattr(scaling, "on_ranks", on_ranks)


@pytest.mark.usefixtures("ideal")
@pytest.mark.parametrize("name", SWEEPS)
def test_a_machine_of_constant_speed_is_as_expected(name: str) -> None:
    rows = scaling.measure(SWEEPS[name], [], rounds=2, steps=3)
    assert all(len(row.tokens_per_second) == 2 for row in rows)
    for row in rows:
        assert scaling.expected(row, rows[0]) == pytest.approx(row.tokens_per_second[0])
        assert row.tokens_per_cpu_second == pytest.approx([2 * speed for speed in row.tokens_per_second])
    assert [line.split(" | ")[-3:-1] for line in scaling.table(name, rows)[2:]] == [["1.00", "1.00"]] * len(rows)


@pytest.mark.parametrize("quick", [True, False])
def test_a_sweep_changes_what_it_is_named_after(quick: bool) -> None:
    known = scaling.sweeps(quick)
    configs = {name: [load(scaling._overrides(point, [])) for point in points] for name, points in known.items()}
    values = {
        "sequence": [config.sequence_length for config in configs["sequence"]],
        "vocabulary": [shape_of(config).vocab_size for config in configs["vocabulary"]],
        "parameters": [sum(parameters(shape_of(config)).values()) for config in configs["parameters"]],
        "ranks": [point.ranks for point in known["ranks"]],
    }
    for name, column in values.items():
        assert column == sorted(set(column)), name
        tokens = {config.global_batch_size * config.sequence_length for config in configs[name]}
        assert len(tokens) == 1, f"{name}: steps of {tokens} tokens cannot be compared"
    if not quick:
        assert values["sequence"][-1] == 8192
        assert values["vocabulary"][-1] == 131072
        assert values["parameters"][0] < 1.5e6 < 50e6 < values["parameters"][-1]


@pytest.mark.parametrize("argument", ["sweeps=vocabulry", "steps=0", "rounds=x", "quick=yes", "ffn=swigluu"])
def test_bad_input_is_refused(argument: str) -> None:
    with pytest.raises(UserError):
        scaling.main([argument])


@pytest.mark.slow
def test_the_quick_sweeps_run(tmp_path: Path) -> None:
    out = tmp_path / "scaling.md"
    arguments = ["quick=true", "rounds=1", "steps=1", f"out={out}"]
    subprocess.run([sys.executable, "-m", "bench.scaling", *arguments], cwd=ROOT, check=True, timeout=600)
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 4 + 4 * 2  # heads, and two points per sweep
    figures = [float(ratio) for row in rows if row[6] != "measured / expected" for ratio in row[6:8]]
    assert len(figures) == 4 * 2 * 2
    assert min(figures) > 0
