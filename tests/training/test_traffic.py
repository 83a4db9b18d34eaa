"""The bytes that ranks send, counted at the collectives, equal those of the formulas in launch.estimate.counts."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest

from conf.load import load
from conf.shape import shape_of
from launch.estimate.counts import context_traffic, rank_parameters, tensor_traffic, zero_traffic
from tests.training.test_parallel import ARMS, SIZES
from tests.training.tiny import overrides

LAYERS = 2


@pytest.fixture(scope="session")
def counted(corpus, two_ranks, four_ranks):
    """A function that counts the traffic of a step: (bytes by group, bytes by collective, the configuration, the shape)."""

    def count(world: int, arm: str = "learned", **changes):
        changes = ARMS[arm] | SIZES | changes
        arguments = overrides(corpus, **{name.replace(".", "__"): value for name, value in changes.items()})
        pool = two_ranks if world == 2 else four_ranks
        results = pool.run("script", arguments=arguments, steps=[["train", 1], ["count_traffic"]])[-1]["values"][0]
        sums: dict[str, float] = collections.defaultdict(float)
        for name, sent in results.items():
            sums[name.split()[0]] += sent
        config = load(arguments)
        return sums, results, config, shape_of(config, 384)

    return count


def slow_unless(default: set[tuple[Any, ...]], *values: Any) -> list[Any]:
    """Return all combinations; those outside `default` run with the slow tests."""
    return [pytest.param(*way, marks=() if way in default else pytest.mark.slow) for way in itertools.product(*values)]


TENSOR = {
    (2, "false", "false", "fp32"),
    (2, "true", "true", "bf16"),
    (2, "true", "selective", "fp32"),
    (4, "true", "false", "fp32"),
}


@pytest.mark.parametrize(
    ("tensor", "sequence", "recompute", "precision"),
    slow_unless(TENSOR, (2, 4), ("false", "true"), ("false", "attention", "selective", "true"), ("fp32", "bf16")),
)
def test_tensor_ranks(counted, tensor, sequence, recompute, precision):
    again = {"model.activation_checkpointing": recompute, "model.qk_norm": "true", "micro_batch_size": 4}
    sums, results, config, shape = counted(
        tensor, zero="1", precision=precision, **{"parallel.tensor": tensor, "parallel.sequence": sequence} | again
    )
    tokens, width = 4 * config.sequence_length, 4 if precision == "fp32" else 2
    expected = tensor_traffic(shape, config.parallel, tokens, width, config.model.activation_checkpointing)
    # Two micro-batches, then the norm: ZeRO all-reduces 4 bytes over tensor ranks, twice for the overflow check.
    assert sums["tensor"] == pytest.approx(2 * sum(expected.values()), rel=0, abs=3 * 2 * 8)
    unit = tokens * shape.d_model * width * (tensor - 1) / tensor
    a_layer = 8 + (4 if recompute == "true" else 0)
    if sequence == "true":  # all traffic of activations are all-gathers and reduce-scatters (Korthikanti 2022)
        assert results["tensor reduce_scatter_base"] == 2 * (LAYERS * (6 if recompute == "true" else 4) + 2) * unit
        gathered_again = 2 + (recompute in ("attention", "selective"))
        assert expected["layers"] == pytest.approx(LAYERS * (a_layer + gathered_again) * unit, rel=0.1)
    else:
        assert expected["layers"] == pytest.approx(LAYERS * a_layer * unit, rel=0.01)
    assert "tensor alltoall_base" not in results


@pytest.mark.parametrize("recompute", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_reductions_over_d_ff_send_a_few_numbers_per_token(counted, tensor, recompute):
    """Of one all-gather a pass, beside those that another arm sends as well."""
    changes = {
        "zero": "1",
        "micro_batch_size": 4,
        "parallel.tensor": tensor,
        "model.activation_checkpointing": recompute,
    }
    sums, results, config, shape = counted(tensor, arm="reducing", **changes)
    tokens = 4 * config.sequence_length
    expected = tensor_traffic(shape, config.parallel, tokens, 4, config.model.activation_checkpointing)
    assert sums["tensor"] == pytest.approx(2 * sum(expected.values()), rel=0, abs=3 * 2 * 8)
    reductions, kept = 5, 7  # mean, std and its mean, rms of norm, max and its channel, sum
    forwards = 2 if recompute == "true" else 1
    numbers = 2 * (LAYERS * (forwards * kept + reductions) + 2)  # of both micro-batches, and two per token of the loss
    assert results["tensor allgather_base"] == 4 * tokens * (tensor - 1) * numbers


@pytest.mark.parametrize(
    ("world", "tensor", "recompute"), [(2, 1, "false"), (4, 2, "false"), (2, 1, "attention"), (2, 1, "true")]
)
def test_context_ranks(counted, world, tensor, recompute):
    changes = {"parallel.context": 2, "parallel.tensor": tensor, "model.activation_checkpointing": recompute}
    _, results, config, shape = counted(world, zero="1", **changes)
    tokens = 8 * config.sequence_length // 2
    assert sum(sent for name, sent in results.items() if name.endswith("alltoall_base")) == context_traffic(
        shape, config.parallel, tokens, 4, config.model.activation_checkpointing
    )


# In bytes: padding, of each parameter to equal partitions or of a group to DeepSpeed's alignment, and the norm.
PADDING = 4 * 4 * (2 * 20 + 8)


ZERO = {("0", 2, 2), ("1", 2, 1), ("2", 2, 2), ("3", 2, 1), ("3", 2, 2), ("1", 4, 2)}


@pytest.mark.parametrize(("zero", "world", "accumulation"), slow_unless(ZERO, "0123", (2, 4), (1, 2)))
def test_zero(counted, zero, world, accumulation):
    tensor = world // 2
    changes = {"zero": zero, "micro_batch_size": 4 // accumulation, "parallel.tensor": tensor}
    sums, _, _, shape = counted(world, arm="gated", **changes)
    # The model is small enough to stay gathered until the step changes it.
    expected = sum(zero_traffic(rank_parameters(shape, tensor), 2, int(zero), accumulation, 4, gathers=1).values())
    assert expected <= sums["data_context"] <= expected + PADDING


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_zero_3_that_keeps_nothing_gathered(counted, accumulation):
    changes = {"zero": "3", "micro_batch_size": 4 // accumulation, "zero.bucket_elements": 1}
    sums, _, _, shape = counted(2, arm="gated", **changes)
    expected = sum(zero_traffic(rank_parameters(shape, 1), 2, 3, accumulation, 4).values())
    expected -= (
        accumulation * shape.vocab_size * shape.d_model * 4 / 2
    )  # the head's backward directly follows its forward
    assert expected <= sums["data_context"] <= expected + accumulation * PADDING
