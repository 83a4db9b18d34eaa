"""A non-finite gradient is reported and changes nothing, on any rank of any stage."""

from __future__ import annotations

import itertools
import math

import pytest

from model.weights import MOMENTS, CheckpointReader
from tests.selection import quick
from tests.training.tiny import overrides

CASES = [("0", "fp32", 1), ("1", "fp32", 2), ("2", "fp32", 1), ("3", "fp32", 1)]
CASES += [("1", "bf16", 1), ("1", "bf16", 2), ("2", "bf16", 1), ("3", "bf16", 2)]


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation"), quick(CASES, ("0", "fp32", 1), ("1", "bf16", 2), ("3", "bf16", 2))
)
def test_a_step_with_a_non_finite_gradient_changes_nothing(corpus, two_ranks, tmp_path, zero, precision, accumulation):
    arguments = overrides(corpus, zero=zero, precision=precision, micro_batch_size=4 // accumulation)
    # One element, on one rank: first NaN on the last, then infinity on the first. NaN in padding does not count.
    steps = [["train", 2], ["pad", math.nan], ["save", tmp_path]]
    steps += [["poison", "layers.0.ffn.down", 1, math.nan], ["save", tmp_path]]
    steps += [["poison", "embedding.weight", 0, math.inf], ["save", tmp_path], ["train", 1], ["save", tmp_path]]
    for rank in two_ranks.run("script", arguments=arguments, steps=steps):
        assert rank["applied"] == [True, True, False, False, True]
        assert [math.isfinite(norm) for norm in rank["norms"]] == rank["applied"]
        assert math.isnan(rank["norms"][2])
        assert rank["norms"][3] == math.inf
        assert all(math.isfinite(loss) for loss in rank["losses"])
        # The third step takes samples 16 to 23, of which rank 1 has the last four.
        samples = ("20:24" if accumulation == 1 else "20:22", "24:28" if accumulation == 1 else "24:26")
        assert rank["culprits"] == [
            f"rank 1 computes NaN in the gradient of layers.0.ffn.down (samples {samples[0]})",
            f"rank 0 computes inf in the gradient of embedding.weight (samples {samples[1]})",
        ]
        assert rank["refused"] == [["", False]] * 4
    before, nan, inf, later = (CheckpointReader(tmp_path / f"step_{step:08d}") for step in (2, 3, 4, 5))
    for name, key in itertools.product(before.shapes(), ("", *MOMENTS)):
        for skipped in (nan, inf):
            assert skipped.tensor(name, key).equal(before.tensor(name, key)), (name, key)
    assert not later.tensor("norm.weight").equal(before.tensor("norm.weight"))
    assert [reader.state["optimizer_steps"] for reader in (before, nan, inf, later)] == [2, 2, 2, 3]
