"""Silent corruption: one bit that differs between replicas, or between two computations of the same gradient, is found."""

from __future__ import annotations

import pytest
import torch

from tests.training.tiny import overrides
from training.silent import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_tells_every_bit_and_every_place(dtype, monkeypatch):
    values = torch.randn(101).to(dtype)
    sums = checksum(values)
    assert torch.equal(checksum(values.clone()), sums)
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for place, bit in ((0, 0), (50, 3), (100, 14)):
        changed = values.clone()
        changed.view(integers)[place] ^= 1 << bit
        assert not torch.equal(checksum(changed), sums)
    assert not torch.equal(checksum(values.flip(0)), sums)
    monkeypatch.setattr("training.silent._BLOCK", 7)
    assert torch.equal(checksum(values), sums)


@pytest.mark.parametrize(("zero", "precision"), [("0", "fp32"), ("1", "fp32"), ("2", "bf16")])
def test_a_replica_that_differs_is_named(corpus, four_ranks, zero, precision):
    arguments = overrides(corpus, zero=zero, precision=precision)
    steps = [["train", 1], ["compare"], ["compare", [2]], ["compare", [0, 1]], ["compare", [0, 1, 3]], ["compare"]]
    steps += [["compare", [3], "head.weight", "exp_avg"]] if zero == "0" else []
    for rank in four_ranks.run("script", arguments=arguments, steps=[*steps, ["train", 1]]):
        same, one, two, three, again, *moment = rank["values"]
        assert same == again == ""
        assert one.startswith("rank 2 holds other bits in norm.weight than the 3 ranks that agree: check the hardware")
        assert "(rank 0, 1; rank 2, 3), and there is no majority" in two
        assert three.startswith("rank 2 holds other bits")
        for sentence in moment:
            assert sentence.startswith("rank 3 holds other bits in head.weight (exp_avg) than the 3")


def test_tensor_ranks_are_compared_with_those_that_hold_the_same_shard(corpus, four_ranks):
    arguments = overrides(corpus, parallel__tensor=2, zero="1", model__d_model=32, model__d_ff=48)
    steps = [["train", 1], ["compare"], ["compare", [1], "layers.0.ffn.down"]]
    for rank in four_ranks.run("script", arguments=arguments, steps=steps):
        assert rank["values"][0] == ""
        assert "hold different bits in layers.0.ffn.down (rank 1; rank 3)" in rank["values"][1]


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_a_gradient_that_differs_from_its_repetition_is_named(corpus, two_ranks, zero):
    steps = [["train", 1], ["repeat"], ["repeat", 1], ["train", 2]]
    arguments = overrides(corpus, zero=zero)
    found = two_ranks.run("script", arguments=arguments, steps=steps)
    for rank in found:
        assert rank["values"][0] == ""
        assert rank["values"][1].startswith(
            "rank 1 computed two different gradients of layers.0.ffn.down from the same"
        )
    usual = two_ranks.run("script", arguments=arguments, steps=[["train", 3]])
    assert found[0]["losses"] == usual[0]["losses"]  # the comparison leaves nothing behind


def test_what_cannot_be_compared_is_refused(no_group, corpus, tmp_path):
    def refusal(**changes) -> str:
        result = no_group.run("command", module="train", arguments=overrides(corpus, tmp_path, run="a", **changes))[0]
        assert result["status"] == 2
        return result["err"]

    assert "guard.replicas has nothing to compare under zero=3" in refusal(guard__replicas=2, zero=3)
    assert "guard.repeat compares bit for bit, which needs deterministic=true" in refusal(guard__repeat=2)
