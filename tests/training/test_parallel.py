"""Tensor, sequence and context parallelism do not change what is learned, under every ZeRO stage."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights import CheckpointReader, save_weights
from tests.training.tiny import Trained, overrides

STEPS = 10
# Sums of fp32 numbers in another order: a few units in the last place (6e-8 each), propagated through 10 steps.
FP32 = 1e-5
LEARNED = {
    "ffn": "custom",
    "ffn.formula": "gate*sigmoid(b*gate)*up + a*up + c*gate + t*up",
    "ffn.parameters": "{b: {init: 1.0, share: channel}, a: {init: 0.1, share: layer}, "
    "c: {init: 0.2, share: group, groups: 4}, t: {schedule: linear, from: 0, to: 0.5}}",
}
# Every kind of reduction over d_ff, one inside another.
REDUCING = {
    "ffn": "custom",
    "ffn.formula": "b*norm(silu(gate - mean(gate) - std(gate))*up) + a*up*max(up)/(1 + sum(gate**2))",
    "ffn.parameters": "{b: {init: 1.0, share: channel}, a: {init: 0.1, share: layer}}",
}
ARMS: dict[str, dict[str, Any]] = {
    "ungated": {"ffn": "relu2"},
    "gated": {"ffn": "swiglu"},
    "learned": LEARNED,
    "reducing": REDUCING,
}
# Sizes that divide over four tensor ranks, but whose shards do not divide further over ZeRO's partitions.
SIZES = {"model.n_heads": 8, "model.n_kv_heads": 4, "model.head_dim": 6, "model.d_ff": 44, "optim.clip": 0.5}
# If a gradient is almost 0, AdamW divides noise by noise. With this epsilon its step is a smooth function of the gradient.
SIZES |= {"optim.eps": 1e-4}


@pytest.fixture(scope="session")
def pool_of(one_rank, two_ranks, four_ranks):
    """A function that returns the pool of a world size."""
    return {1: one_rank, 2: two_ranks, 4: four_ranks}.__getitem__


def command_line(
    corpus: Path,
    arm: str = "gated",
    zero: str = "0",
    tensor: int = 1,
    _data: int = 1,  # the launcher decides it
    sequence: bool = False,
    context: int = 1,
    **more: Any,
) -> list[str]:
    """Return the overrides of an arm on tensor x context x data ranks."""
    changes = ARMS[arm] | SIZES | {"zero": zero, "parallel.tensor": tensor, "parallel.context": context} | more
    changes["parallel.sequence"] = str(sequence).lower()
    return overrides(corpus, **{name.replace(".", "__"): value for name, value in changes.items()})


@pytest.fixture(scope="session")
def arguments_of(corpus):
    """A function that returns the command line of what `ran` trains."""
    return functools.partial(command_line, corpus)


@pytest.fixture(scope="session")
def ran(arguments_of, pool_of, tmp_path_factory):
    """A function that trains 10 steps of an arm on tensor x context x data ranks, once for the same arguments."""
    folder = tmp_path_factory.mktemp("parallel")

    @functools.cache
    def train(
        arm: str = "gated",
        zero: str = "0",
        tensor: int = 1,
        data: int = 1,
        sequence: bool = False,
        context: int = 1,
        **more,
    ) -> Trained:
        arguments = arguments_of(arm, zero, tensor, data, sequence, context, **more)
        path = folder / str(len(list(folder.iterdir())))
        steps = [["train", 5], ["save", str(path)], ["train", 5], ["save", str(path)], ["evaluate", 512]]
        results = pool_of(tensor * context * data).run("script", arguments=arguments, steps=steps)
        return Trained(results, arguments, path / "step_00000005", path / "step_00000010")

    return train


def worst(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference."""
    assert len(a) == len(b) == STEPS
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def assert_same(run: Trained, single: Trained) -> None:
    assert min(single.norms) > 0.5, "clipping is not active"
    assert single.losses[-1] < 0.98 * single.losses[0], "nothing is learned"
    for rank in run.results:
        assert worst(rank["losses"], single.losses) < FP32
        assert worst(rank["norms"], single.norms) < FP32
        assert rank["applied"] == [True] * STEPS
        assert rank["evaluations"][0][0] == pytest.approx(single.results[0]["evaluations"][0][0], rel=FP32)
        assert rank["evaluations"][0][1] == single.results[0]["evaluations"][0][1]
    here, there = CheckpointReader(run.end), CheckpointReader(single.end)
    assert here.shapes() == there.shapes()
    for name in there.shapes():
        for key in ("", "exp_avg", "exp_avg_sq"):
            difference = float((here.tensor(name, key) - there.tensor(name, key)).abs().max())
            assert difference < FP32, (name, key, difference)


RANKS = [(1, 1, False), (1, 2, False), *itertools.product((2,), (1, 2), (False, True)), (4, 1, False), (4, 1, True)]


# Each topology with one stage, each stage, and the arm with learned parameters, which covers the others, with most of them.
DEFAULT = {
    ("learned", 1, 1, False, "1"),
    ("learned", 1, 2, False, "2"),
    ("learned", 2, 1, False, "3"),
    ("ungated", 2, 1, True, "1"),
    ("learned", 2, 2, False, "0"),
    ("learned", 2, 2, True, "3"),
    ("learned", 4, 1, False, "1"),
    ("learned", 4, 1, True, "2"),
    ("reducing", 2, 2, True, "3"),
    ("reducing", 4, 1, False, "1"),
}
WAYS = [
    pytest.param(arm, *ranks, zero, marks=() if (arm, *ranks, zero) in DEFAULT else pytest.mark.slow)
    for arm, ranks, zero in itertools.product(ARMS, RANKS, "0123")
]


def slow(*values: Any) -> Any:
    """Return a variant that runs with the slow tests: others cover the parts that it combines."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("arm", "tensor", "data", "sequence", "zero"), WAYS)
def test_every_topology_learns_what_one_process_learns(ran, arm, tensor, data, sequence, zero):
    assert_same(ran(arm, zero, tensor, data, sequence), ran(arm))


def test_the_guide_counts_these_combinations():
    guide = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text(encoding="utf-8").replace("\n", " ")
    quick = [way for way in WAYS if not getattr(way, "marks", ())]
    assert f"checks {len(WAYS)} combinations of arm, parallelism and stage with AdamW" in guide
    assert f"`make test` checks {len(quick)} and " in guide


@pytest.mark.parametrize(
    ("save", "recompute"),
    [("input", "false"), slow("everything", "false"), slow("packed", "true"), ("input", "attention")],
)
def test_reductions_with_whatever_is_saved(ran, save, recompute):
    """What ranks have reduced is saved in any case, and reduced again where the whole layer is."""
    keys = {"ffn.save": save, "model.activation_checkpointing": recompute}
    assert_same(ran("reducing", "1", tensor=2, sequence=True, **keys), ran("reducing"))


@pytest.mark.parametrize(
    ("zero", "tensor", "data", "sequence"),
    [
        slow("0", 1, 1, False),
        slow("1", 1, 2, False),
        slow("2", 2, 1, False),
        slow("1", 2, 1, True),
        ("3", 2, 1, True),
        slow("2", 1, 1, False),
        slow("3", 1, 1, False),
    ],
)
def test_context_ranks_learn_what_one_process_learns(ran, zero, tensor, data, sequence):
    assert_same(ran("gated", zero, tensor, data, sequence, context=2), ran("gated"))


OPTIONS = {
    "model.mask_documents": "true",
    "model.qk_norm": "true",
    "model.z_loss": 0.01,
    "model.logit_softcap": 2.0,
    "model.tie_embeddings": "true",
}


@pytest.mark.parametrize(
    ("zero", "tensor", "sequence", "context"), [("1", 2, True, 2), slow("3", 2, False, 1), slow("0", 1, False, 2)]
)
def test_model_options_under_every_parallelism(ran, zero, tensor, sequence, context):
    """Document masking, QK-norm, z-loss, a soft cap and a tied head."""
    one = ran("gated", "0", **OPTIONS)
    assert one.losses != ran("gated", "0").losses
    assert_same(ran("gated", zero, tensor, 1, sequence, context, **OPTIONS), one)


@pytest.mark.parametrize(
    ("zero", "kind"),
    [slow("1", "true"), slow("3", "true"), slow("1", "attention"), slow("2", "selective"), ("3", "selective")],
)
def test_recomputed_layers_draw_no_random_numbers(ran, zero, kind):
    again = {"model.activation_checkpointing": kind, "micro_batch_size": 2}
    assert_same(ran("gated", zero, 2, 1, True, **again), ran("gated"))


@pytest.mark.parametrize("zero", ["offload", slow("1"), slow("2"), slow("3")])
def test_accumulation_and_offload_with_tensor_ranks(ran, zero):
    assert_same(ran("learned", zero, 2, 2, True, micro_batch_size=2), ran("learned"))


@pytest.mark.parametrize(
    ("zero", "tensor", "data", "sequence", "context", "micro"),
    [
        slow("1", 2, 1, False, 1, 8),
        slow("1", 2, 2, True, 1, 1),
        slow("2", 2, 2, True, 1, 4),
        ("3", 2, 1, True, 1, 8),
        slow("1", 1, 1, False, 2, 8),
    ],
)
def test_bf16_is_within_its_noise(ran, zero, tensor, data, sequence, context, micro):
    """The noise is the effect of bf16 on one process: the largest of three, which add up their gradients in other orders."""
    exact = ran("gated")
    alone = [ran("gated", "1", precision="bf16", micro_batch_size=size) for size in (8, 4, 2)]
    run = ran("gated", zero, tensor, data, sequence, context, precision="bf16", micro_batch_size=micro)
    for name in ("losses", "norms"):
        noise = max(worst(getattr(one, name), getattr(exact, name)) for one in alone)
        assert 1e-5 < noise < 0.02
        assert worst(getattr(run, name), getattr(exact, name)) < 2 * noise


@pytest.mark.parametrize(("zero", "tensor", "sequence"), [slow("1", 2, True), slow("2", 2, False), ("3", 2, True)])
def test_zero_options_with_tensor_ranks(ran, zero, tensor, sequence):
    """Overlapped reduction; in stage 3, parameters and optimizer state in CPU memory."""
    more = {"zero.overlap": "true", "zero.bucket_elements": 3000}
    if zero == "3":
        more |= {"zero.offload_parameters": "true", "zero.offload_optimizer": "true"}
    assert_same(ran("gated", zero, tensor, 2, sequence, **more), ran("gated"))


@pytest.mark.parametrize(
    ("zero", "tensor", "data", "sequence", "context"),
    [("1", 4, 1, True, 1), ("3", 2, 1, True, 2), slow("3", 1, 1, False, 1)],
)
def test_logits_for_generation_are_those_of_one_process(
    ran, arguments_of, pool_of, zero, tensor, data, sequence, context
):
    """With a cache and without; every rank returns the logits of the whole vocabulary."""
    one, arguments = ran("gated"), arguments_of("gated", zero, tensor, data, sequence, context)
    steps = [["load", str(one.end)], ["logits", [[1, 2, 3], [4]]], ["logits", [[1, 2, 3, 4]]]]
    expected = pool_of(1).run("script", arguments=one.arguments, steps=steps)[0]["values"]
    assert len(expected[0]) == 384
    assert expected[0] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    for rank in pool_of(tensor * data * context).run("script", arguments=arguments, steps=steps):
        for here, there in zip(rank["values"], expected, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


def test_replicated_parameters_stay_bit_equal_and_no_random_number_is_drawn(four_ranks, arguments_of):
    arguments = arguments_of("learned", "1", 4, 1, True, **{"model.activation_checkpointing": "true"})
    sums = "{n: p.double().sum().item() for n, p in engine.module.named_parameters() if not hasattr(p, 'shard_spec')}"
    state = "torch.get_rng_state().tolist()"
    results = four_ranks.run(
        "script", arguments=arguments, steps=[["inspect", state], ["train", 5], ["inspect", state], ["inspect", sums]]
    )
    first = results[0]["values"][2]
    assert len(first) == 7  # five norms, and the learned slope of each layer
    for rank in results:
        before, after, replicated = rank["values"]
        assert replicated == first
        assert before == after


def test_telemetry_is_that_of_the_whole_model(ran):
    one = ran("gated").results[0]["telemetry"]
    assert [step for step, _ in one] == [5, 10]
    for arguments in (("gated", "1", 2, 2, True), ("gated", "3", 2, 1, True, 2), ("gated", "2", 1, 1, False, 2)):
        for (_, here), (_, there) in zip(ran(*arguments).results[0]["telemetry"], one, strict=True):
            assert here.keys() == there.keys()
            for name in there:
                # Six digits are recorded, and a fraction of few units moves by whole units if one lies at a threshold.
                assert torch.tensor(flat(here[name])).allclose(torch.tensor(flat(there[name])), rtol=1e-3, atol=1e-6), (
                    name
                )


def flat(figure: Any) -> list[float]:
    return [float("inf") if x is None else x for x in (figure if isinstance(figure, list) else [figure])]


PAIRS = [
    # (arm, (zero, tensor, data, sequence, context): saved on -> loaded on)
    ("learned", ("3", 2, 2, True, 1), ("1", 1, 1, False, 1)),
    slow("learned", ("1", 1, 1, False, 1), ("3", 2, 2, True, 1)),
    slow("learned", ("2", 4, 1, True, 1), ("1", 2, 1, False, 1)),
    slow("learned", ("offload", 2, 2, True, 1), ("2", 1, 2, False, 1)),
    ("gated", ("3", 2, 1, True, 2), ("2", 4, 1, True, 1)),
    slow("gated", ("2", 1, 1, False, 2), ("0", 2, 1, False, 1)),
    ("gated", ("0", 1, 1, False, 1), ("1", 1, 1, False, 2)),
    slow("learned", ("2", 1, 2, False, 1), ("2", 2, 1, True, 1)),
    slow("gated", ("2", 2, 1, False, 1), ("2", 1, 2, False, 1)),
    slow("gated", ("0", 1, 1, False, 1), ("1", 4, 1, True, 1)),
    slow("learned", ("3", 4, 1, False, 1), ("0", 2, 1, False, 1)),
    slow("gated", ("1", 4, 1, True, 1), ("3", 2, 2, False, 1)),
    slow("learned", ("2", 2, 2, True, 1), ("3", 4, 1, True, 1)),
    slow("gated", ("3", 1, 2, False, 1), ("2", 2, 2, False, 1)),
    slow("learned", ("0", 2, 1, True, 1), ("3", 1, 1, False, 1)),
    slow("gated", ("1", 2, 2, False, 1), ("1", 4, 1, False, 1)),
]


@pytest.mark.parametrize(("arm", "saved_on", "loaded_on"), PAIRS)
def test_a_run_resumes_from_any_parallelism_under_any_other(ran, arguments_of, pool_of, arm, saved_on, loaded_on):
    source, arguments = ran(arm, *saved_on), arguments_of(arm, *loaded_on)
    _, tensor, data, _, context = loaded_on
    steps = [["load", str(source.middle)], ["train", 5]]
    results = pool_of(tensor * data * context).run("script", arguments=arguments, steps=steps)
    assert results[0]["losses"] == pytest.approx(source.losses[5:], rel=FP32)
    assert results[0]["norms"] == pytest.approx(source.norms[5:], rel=FP32)


def test_exchanged_gate_and_up_would_be_noticed(ran, pool_of, tmp_path):
    """The tests above rely on this: exchanging them in a checkpoint changes the losses."""
    source = ran("learned", "3", 2, 1)
    reader = CheckpointReader(source.middle)
    weights = {name: reader.tensor(name) for name in reader.shapes()}
    exchanged = {name: tensor.flip(0) if name.endswith("ffn.up") else tensor for name, tensor in weights.items()}
    losses = []
    for number, tensors in enumerate((weights, exchanged)):
        save_weights(tmp_path / f"{number}" / "step_00000005", tensors.items(), {"step": 5})
        steps = [["load", str(tmp_path / f"{number}" / "step_00000005")], ["train", 2]]
        losses.append(pool_of(2).run("script", arguments=source.arguments, steps=steps)[0]["losses"])
    assert losses[0][0] == pytest.approx(source.losses[5], rel=FP32)  # of the weights alone, unlike the next loss
    assert abs(losses[1][0] / losses[0][0] - 1) > 100 * FP32


@pytest.mark.parametrize(("arm", "zero"), [slow("gated", "0"), ("gated", "1"), slow("gated", "2"), ("learned", "3")])
def test_the_same_parallelism_resumes_bit_for_bit(ran, pool_of, arm, zero):
    run = ran(arm, zero, 2, 2, True)
    results = pool_of(4).run("script", arguments=run.arguments, steps=[["load", str(run.middle)], ["train", 5]])
    assert results[0]["losses"] == run.losses[5:]
    assert results[0]["norms"] == run.norms[5:]
