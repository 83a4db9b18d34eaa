"""The ranks agree on the checkpoint that a run goes on from, and each file is hashed once per node."""

from __future__ import annotations

from pathlib import Path

import pytest

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
