"""The optimizer that docs/extending.md adds trains, is sharded, and is resumed like the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.weights import CheckpointReader
from tests.training.tiny import overrides

ROOT = Path(__file__).parents[2]
FP32 = 1e-5  # sums in another order, as in test_parity.py
REGISTER = """
from conf.optimizers import OPTIMIZERS
from training.optimizers import UPDATES
OPTIMIZERS["sgd"], UPDATES["sgd"] = SGD, Sgd
"""


def example() -> str:
    """Return the code of the section."""
    section = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("## An optimizer")[1].split("\n## ")[0]
    code = section.split("```python test=run\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 40
    return code + REGISTER


def test_an_optimizer_of_one_s_own(corpus, one_rank, two_ranks, tmp_path):
    runs = {}
    for zero, pool, tensor in (("0", one_rank, 1), ("1", two_ranks, 1), ("3", two_ranks, 1), ("2", two_ranks, 2)):
        keys = {"optim__name": "sgd", "optim__lr": 0.1, "model__d_ff": 46, "parallel__tensor": tensor}
        arguments = overrides(corpus, zero=zero, **keys)
        path = tmp_path / f"{zero}-{tensor}"
        steps = [["train", 3], ["save", str(path)], ["train", 3], ["save", str(path)]]
        runs[zero] = pool.run("script", arguments=arguments, steps=steps, prelude=example())[0]["losses"]
    one = runs.pop("0")
    assert one[-1] < one[0]
    for losses in runs.values():
        assert losses == pytest.approx(one, rel=FP32)
    reader = CheckpointReader(tmp_path / "3-1" / "step_00000006")
    assert reader.states("norm.weight") == ("momentum",)
    arguments = overrides(corpus, zero="1", optim__name="sgd", optim__lr=0.1, model__d_ff=46)
    steps = [["load", str(tmp_path / "3-1" / "step_00000003")], ["train", 3]]
    resumed = one_rank.run("script", arguments=arguments, steps=steps, prelude=example())[0]["losses"]
    assert resumed == pytest.approx(one[3:], rel=FP32)
