"""The ranks agree on the checkpoint that a run goes on from, and each file is hashed once per node."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.fuzz.indexes import CHECKPOINT, resume
from bench.fuzz.sound import run_config, write_run
from kernels.common.errors import UserError

FILES = ["rank_00000.safetensors", "rank_00001.safetensors"]


@pytest.fixture
def agree(trained, two_ranks):
    """A function that lets two ranks agree on one of two checkpoints, and the names of these, newest first."""
    run = trained(2, "1")
    return lambda **how: two_ranks.run("agree", arguments=run.arguments, folder=str(run.end.parent), **how), run


def of(checkpoint: Path, *files: str) -> list[str]:
    return [f"{checkpoint.name}/{name}" for name in files]


def test_each_file_is_hashed_once_on_each_node(agree):
    ask, run = agree
    assert ask(per_node=2) == [[run.end.name, of(run.end, name)] for name in FILES]
    assert ask(per_node=1) == [[run.end.name, of(run.end, *FILES)]] * 2


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_read_no_rank_goes_on_from(agree, per_node, rank):
    ask, run = agree
    decisions = ask(per_node=per_node, bad_rank=rank, bad_file=of(run.end, FILES[rank])[0])
    assert [name for name, _ in decisions] == [run.middle.name] * 2


def test_a_refusal_of_rank_0_is_that_of_every_rank(trained, two_ranks, tmp_path):
    decisions = two_ranks.run("agree", arguments=trained(2, "1").arguments, folder=str(tmp_path), per_node=2)
    assert decisions == [["none is left", 75, []]] * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skipped_samples", [[0, math.inf]]),
        ("skipped_samples", [[1.5, 3]]),
        ("wall_seconds", math.inf),
        ("wall_seconds", math.nan),
        ("wall_seconds", 10**30),
        ("wall_seconds", -1.0),
        ("warmup_steps", -2),
        ("steps", 10**30),
        ("step", 8.0),
    ],
)
def test_a_state_that_no_run_can_have_saved_is_passed_over(key, value, tmp_path):
    config = run_config()
    run = write_run(config, tmp_path)
    path = run / CHECKPOINT / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}))
    with pytest.raises(UserError, match=f"state.json gives no {key}"):
        resume(run, config, fits=True)
