"""Muon learns the same on any ranks: each logical matrix is orthogonalised as a whole, once."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.load import load
from conf.shape import shape_of
from data.batches import BatchStream, open_dataset
from data.prepare import prepare
from launch.estimate.optimizer import count_matrices, optimizer_traffic
from model import decoder
from model.attention import attend
from model.decoder import Decoder
from model.initialise import initialise
from model.weights import CheckpointReader
from tests.training.test_parallel import SIZES, slow, worst
from tests.training.tiny import Trained, overrides
from training.optimizers.matrices import logical_matrices
from training.schedule import lr_scale

LEARNED = {
    "ffn": "custom",
    "ffn.formula": "gate*sigmoid(b*gate)*up + a*up",
    "ffn.parameters": "{b: {init: 1.0, share: channel}, a: {init: 0.1, share: layer}}",
}
STEPS = 10
# Sums of fp32 numbers in another order, as in test_parallel.py.
FP32 = 1e-5
MUON = {"optim": "muon", "optim.lr": 0.02, "optim.weight_decay": 0.2, "optim.adamw_lr": 0.01}
ROUNDS = "setattr(__import__('sys').modules['training.optimizers.exchange'], 'ROUND_ELEMENTS', {})"


@pytest.fixture(scope="session")
def ran(corpus, one_rank, two_ranks, four_ranks, tmp_path_factory):
    """A function that trains 10 steps with Muon on tensor x context x data ranks, once for the same arguments."""
    folder, pools = tmp_path_factory.mktemp("muon"), {1: one_rank, 2: two_ranks, 4: four_ranks}

    @functools.cache
    def train(
        zero: str = "0", tensor: int = 1, data: int = 1, sequence: bool = False, context: int = 1, **more: Any
    ) -> Trained:
        keys = LEARNED | SIZES | MUON | {"zero": zero, "parallel.tensor": tensor, "parallel.context": context}
        keys |= {"parallel.sequence": str(sequence).lower()} | more
        arguments = overrides(corpus, **{name.replace(".", "__"): value for name, value in keys.items()})
        path = folder / str(len(list(folder.iterdir())))
        steps = [["train", 5], ["save", str(path)], ["train", 5], ["save", str(path)]]
        # Rounds of one or two matrices, as large models have them.
        steps = [["inspect", ROUNDS.format(2000)], *steps, ["inspect", ROUNDS.format(2**24)]]
        results = pools[tensor * context * data].run("script", arguments=arguments, steps=steps)
        return Trained(results, arguments, path / "step_00000005", path / "step_00000010")

    return train


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the paper, written out."""
    x = matrix / (matrix.norm() * 1.01 + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def pieces(name: str, weight: Tensor) -> list[Tensor]:
    """Views of the logical matrices of a parameter of this model: 8 query heads and 4 key heads of 6."""
    if name.endswith("ffn.up"):
        return list(weight)
    return list(weight.split([48, 24, 24])) if name.endswith("qkv") else [weight]


def by_rows(update: Tensor, variance: Tensor) -> Tensor:
    """NorMuon's division by the size of rows, as in its paper; the size of the whole is left to the caller."""
    variance.mul_(0.95).add_(0.05 * update.square().mean(1))
    update = update / (variance.sqrt()[:, None] + 1e-4)
    return update * min(update.shape) ** 0.5 / (update.norm() + 1e-4)


def shrunk(qkv: Tensor, largest: Tensor, limit: float) -> None:
    """QK-clip, head by head: 8 query heads, pairs of which share a key head, of 6 channels each."""
    for head in range(8):
        both = [limit / max(limit, float(largest[h])) for h in (head // 2 * 2, head // 2 * 2 + 1)]
        of_key = min(both) ** 0.5
        qkv[6 * head : 6 * head + 6] *= both[head % 2] / of_key
        if head % 2:
            qkv[48 + head // 2 * 6 : 48 + head // 2 * 6 + 6] *= of_key


def watched_logits(monkeypatch) -> list[Tensor]:
    """Return a list to which every forward pass adds the largest attention logit of each head, layer by layer."""
    found: list[Tensor] = []

    def watch(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k.repeat_interleave(2, 2)) * 6**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        found.append(scores.detach().masked_fill(future, -torch.inf).amax((0, 2, 3)))
        return attend(q, k, *others)

    monkeypatch.setattr(decoder, "attend", watch)
    return found


def plain(arguments: list[str], logits: list[Tensor]) -> tuple[list[float], list[float], dict[str, Tensor], dict, dict]:
    """Train with plain PyTorch in one process; return losses, norms, weights, momenta and the variances of rows.

    Args:
        logits: where forward passes put the largest ones of each head.
    """
    config = load(arguments)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    shape = shape_of(config, dataset.vocab_size)
    model = Decoder(shape, config.model, "sdpa")
    initialise(model, shape, config.seed)
    named = dict(model.named_parameters())
    hidden = [n for n, p in named.items() if n.startswith("layers.") and p.ndim > 1 and "learned" not in n]
    momenta = {n: torch.zeros_like(named[n]) for n in hidden}
    variances = {n: torch.zeros(named[n].shape[:-1]) for n in hidden}
    others = [p for n, p in named.items() if n not in hidden]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.2},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    stream = BatchStream(dataset, config.sequence_length, config.data_seed)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = torch.from_numpy(stream.samples(8 * step, 8))
        predicted = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        scale = lr_scale(config.schedule, step, config.steps)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * scale
        adamw.step()
        with torch.no_grad():
            for name in hidden:
                gradient, momentum = named[name].grad, momenta[name]
                assert gradient is not None
                momentum.mul_(0.95).add_(gradient, alpha=0.05)
                update = 0.95 * momentum + 0.05 * gradient
                parts = [pieces(name, tensor) for tensor in (named[name], update, variances[name])]
                for weight, each, variance in zip(*parts, strict=True):
                    step = orthogonal(each)
                    step = by_rows(step, variance) if config.optim.name == "normuon" else step
                    weight.mul_(1 - 0.02 * scale * 0.2)
                    weight.sub_(0.02 * scale * 0.2 * max(each.shape) ** 0.5 * step)
            for layer in range(2) if config.optim.qk_clip else ():
                shrunk(named[f"layers.{layer}.attention.qkv"], logits[layer], config.optim.qk_clip)
        logits.clear()
        model.zero_grad()
    return losses, norms, {n: p.detach() for n, p in named.items()}, momenta, variances


@pytest.mark.parametrize(("name", "limit"), [("muon", 0), ("normuon", 0), ("muon", 0.3)])
def test_one_rank_follows_plain_pytorch(ran, monkeypatch, name, limit):
    run = ran(optim=name, **{"optim.qk_clip": limit})
    losses, norms, weights, momenta, variances = plain(run.arguments, watched_logits(monkeypatch))
    assert not limit or worst(losses, ran(optim=name, **{"optim.qk_clip": 0}).losses) > 100 * FP32, "nothing is clipped"
    assert min(norms) > 0.5, "clipping is not active"
    assert losses[-1] < 0.98 * losses[0], "nothing is learned"
    assert worst(run.losses, losses) < FP32
    assert worst(run.norms, norms) < FP32
    reader = CheckpointReader(run.end)
    for name, weight in weights.items():
        assert float((reader.tensor(name) - weight).abs().max()) < FP32, name
        assert reader.states(name) == (("momentum",) if name in momenta else ("exp_avg", "exp_avg_sq")), name
    for name, momentum in momenta.items():
        assert float((reader.tensor(name, "momentum") - momentum).abs().max()) < FP32, name
        for found in reader.row_states(name).values():
            assert float((found - variances[name].flatten()).abs().max()) < FP32, name
    assert bool(reader.row_states("layers.0.ffn.up")) == (run.arguments.count("optim=normuon") == 1)


def assert_same(run: Trained, single: Trained) -> None:
    for rank in run.results:
        assert worst(rank["losses"], single.losses) < FP32
        assert worst(rank["norms"], single.norms) < FP32
        assert rank["applied"] == [True] * STEPS
    here, there = CheckpointReader(run.end), CheckpointReader(single.end)
    assert here.shapes() == there.shapes()
    for name in there.shapes():
        assert here.states(name) == there.states(name)
        for key in ("", *there.states(name)):
            difference = float((here.tensor(name, key) - there.tensor(name, key)).abs().max())
            assert difference < FP32, (name, key, difference)
        rows = here.row_states(name), there.row_states(name)
        assert rows[0].keys() == rows[1].keys()
        assert all(torch.allclose(rows[0][key], rows[1][key], rtol=0, atol=FP32) for key in rows[0])


RANKS = [(1, 1, False, 1), (1, 2, False, 1), (2, 1, False, 1), (2, 1, True, 1), (2, 2, False, 1), (2, 2, True, 1)]
RANKS += [(4, 1, False, 1), (4, 1, True, 1), (1, 1, False, 2), (2, 1, True, 2), (1, 2, False, 2)]
# Each stage, each topology once, and stage 3, whose partitions cut every matrix, with most of them.
DEFAULT = {
    ("2", 1, 2, False, 1),
    ("0", 2, 2, False, 1),
    ("3", 2, 2, True, 1),
    ("1", 4, 1, False, 1),
    ("3", 2, 1, True, 2),
    ("2", 1, 2, False, 2),
}
WAYS = [
    pytest.param(zero, *ranks, marks=() if (zero, *ranks) in DEFAULT else pytest.mark.slow)
    for zero, ranks in itertools.product("0123", RANKS)
]


@pytest.mark.parametrize(("zero", "tensor", "data", "sequence", "context"), WAYS)
def test_every_topology_learns_what_one_process_learns(ran, zero, tensor, data, sequence, context):
    assert_same(ran(zero, tensor, data, sequence, context), ran())


def test_the_guide_counts_these_combinations_of_muon():
    guide = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text(encoding="utf-8").replace("\n", " ")
    quick = [way for way in WAYS if not getattr(way, "marks", ())]
    assert f"and {len(WAYS)} with [Muon]" in guide
    assert f" and {len(quick)} of them." in guide


@pytest.mark.parametrize("zero", ["offload", slow("1"), slow("2"), slow("3")])
def test_accumulation_and_offload(ran, zero):
    assert_same(ran(zero, 2, 2, True, micro_batch_size=2), ran())


def test_an_offloaded_state_of_whole_weights(ran):
    assert_same(ran("2", 1, 2, **{"zero.offload_optimizer": "true"}), ran())


OPTIONS = {
    "heads": {"optim.split_heads": "true", "optim.nesterov": "false"},
    "polar express": {"optim.ns_coefficients": "polar_express", "optim.ns_steps": 7, "optim.update_scale": "spectral"},
    "normuon of heads": {"optim": "normuon", "optim.split_heads": "true"},
    "normuon": {"optim": "normuon"},
    "qk_clip": {"optim.qk_clip": 0.3},
}


# The slow ones are parts of the others, or change one matrix at a time, as test_newton_schulz.py checks.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name in ("normuon of heads", "qk_clip") else pytest.mark.slow)
        for name, options in OPTIONS.items()
    ],
)
@pytest.mark.parametrize(
    ("zero", "tensor", "data", "context"), [("3", 2, 2, 1), slow("0", 2, 1, 2), slow("1", 2, 2, 1), slow("2", 1, 2, 2)]
)
def test_options_on_several_ranks(ran, options, zero, tensor, data, context):
    one = ran(**options)
    assert one.losses != ran().losses
    assert_same(ran(zero, tensor, data, context=context, **options), one)


@pytest.mark.parametrize(("zero", "tensor", "data", "micro"), [slow("1", 2, 2, 4), ("3", 1, 2, 4), slow("2", 1, 2, 2)])
def test_bf16_is_within_its_noise(ran, zero, tensor, data, micro):
    """The noise is the effect of bf16 on one process: the largest of three, which add up their gradients in other orders."""
    exact = ran()
    alone = [ran("1", precision="bf16", micro_batch_size=size) for size in (8, 4, 2)]
    run = ran(zero, tensor, data, precision="bf16", micro_batch_size=micro)
    for name in ("losses", "norms"):
        noise = max(worst(getattr(one, name), getattr(exact, name)) for one in alone)
        assert 1e-5 < noise < 0.05
        assert worst(getattr(run, name), getattr(exact, name)) < 2 * noise


PAIRS = [
    # (zero, tensor, data, sequence, context): saved on -> loaded on
    (("3", 2, 2, True, 1), ("1", 1, 1, False, 1)),
    slow(("1", 1, 1, False, 1), ("3", 2, 2, True, 1)),
    (("0", 2, 1, False, 1), ("2", 1, 2, False, 1)),
    slow(("2", 1, 2, False, 2), ("0", 4, 1, False, 1)),
    slow(("1", 4, 1, False, 1), ("3", 1, 1, False, 2)),
    slow(("3", 1, 2, False, 1), ("1", 2, 2, True, 1)),
]


@pytest.mark.parametrize(("saved_on", "loaded_on"), PAIRS)
@pytest.mark.parametrize("optim", ["muon", pytest.param("normuon", marks=pytest.mark.slow)])
def test_a_run_resumes_from_any_parallelism_under_any_other(
    ran, one_rank, two_ranks, four_ranks, saved_on, loaded_on, optim
):
    source, target = ran(*saved_on, optim=optim), ran(*loaded_on, optim=optim)
    pool = {1: one_rank, 2: two_ranks, 4: four_ranks}[loaded_on[1] * loaded_on[2] * loaded_on[4]]
    results = pool.run("script", arguments=target.arguments, steps=[["load", str(source.middle)], ["train", 5]])
    assert results[0]["losses"] == pytest.approx(source.losses[5:], rel=FP32)
    assert results[0]["norms"] == pytest.approx(source.norms[5:], rel=FP32)


@pytest.mark.parametrize(("zero", "optim"), [slow("0", "muon"), slow("2", "muon"), ("3", "normuon")])
def test_the_same_parallelism_resumes_bit_for_bit(ran, four_ranks, zero, optim):
    run = ran(zero, 2, 2, optim=optim)
    results = four_ranks.run("script", arguments=run.arguments, steps=[["load", str(run.middle)], ["train", 5]])
    assert results[0]["losses"] == run.losses[5:]
    assert results[0]["norms"] == run.norms[5:]


def test_replicas_stay_bit_equal(ran, four_ranks):
    steps = [["train", 3], ["compare"], ["compare", [3], "layers.1.ffn.down", "momentum"]]
    for rank in four_ranks.run("script", arguments=ran("0", 1, 4).arguments, steps=steps):
        same, differing = rank["values"]
        assert same == ""
        assert differing.startswith("rank 3 holds other bits in layers.1.ffn.down (momentum) than the 3")


@pytest.mark.parametrize(("zero", "tensor", "data"), [("0", 2, 2), slow("0", 4, 1), slow("1", 2, 2), ("3", 1, 2)])
def test_no_matrix_is_computed_twice_and_the_traffic_is_as_counted(ran, two_ranks, four_ranks, zero, tensor, data):
    run = ran(zero, tensor, data)
    exchanges = "[g.exchange for g in inner.matrix_groups.values()]"
    own = f"[(e.owners[p.matrix], p.size) for e in {exchanges} for p in e.pieces]"
    steps = [["count_traffic"], ["inspect", f"[o for e in {exchanges} for o in e.owners]"], ["inspect", own]]
    results = (two_ranks if tensor * data == 2 else four_ranks).run("script", arguments=run.arguments, steps=steps)
    config = load(run.arguments)
    shape = shape_of(config, 384)
    owners = results[0]["values"][1]
    assert all(rank["values"][1] == owners for rank in results)  # all ranks agree
    assert len(owners) == sum(count_matrices(shape).values())
    sent = expected = 0
    for rank, result in enumerate(results):
        traffic, _, pieces = result["values"]
        sent += sum(size for name, size in traffic.items() if name.endswith("alltoall_base"))
        for owner, size in pieces:
            # To the owner, where another replica does not hold the same, and back.
            gathers = zero != "0" or owner // tensor == rank // tensor
            expected += 4 * size * (owner != rank) * (1 + gathers)
    assert sent == expected
    if zero == "0":  # every rank of a replica holds as much of each matrix, so the estimate is exact
        assert sent / len(results) == pytest.approx(optimizer_traffic(shape, config.optim, tensor, data, 0, 4))


def test_the_estimate_counts_the_matrices_of_the_model(corpus):
    for heads, ffn in itertools.product((False, True), ("swiglu", "relu2")):
        config = load(overrides(corpus, ffn=ffn))
        shape = shape_of(config, 384)
        with torch.device("meta"):
            named = dict(Decoder(shape, config.model, "sdpa").named_parameters())
        found: dict[tuple[int, int], int] = {}
        for name, parameter in named.items():
            if name.startswith("layers.") and parameter.ndim > 1:
                for matrix in logical_matrices(name, parameter, 1, shape.head_dim if heads else None):
                    found[matrix.rows, matrix.columns] = found.get((matrix.rows, matrix.columns), 0) + 1
        assert found == count_matrices(shape, heads)


def test_an_optimizer_takes_over_only_when_asked(trained, one_rank, tmp_path):
    """A checkpoint of AdamW goes on under Muon with `resume_optimizer=fresh`, once."""
    adamw, arguments = trained(1, "1"), [*trained(1, "1").arguments, "optim=muon"]
    arguments = [word for word in arguments if not word.startswith("optim.")]
    steps = [["load", str(adamw.middle)], ["train", 1], ["save", str(tmp_path)]]
    with pytest.raises(pytest.fail.Exception, match=r"holds the state of another optimizer \(exp_avg, exp_avg_sq\)"):
        one_rank.run("script", arguments=arguments, steps=steps)
    fresh = [*arguments, "resume_optimizer=fresh"]
    results = one_rank.run("script", arguments=fresh, steps=steps)
    assert results[0]["losses"][0] == pytest.approx(adamw.losses[5], rel=FP32)
    reader = CheckpointReader(tmp_path / "step_00000006")
    assert reader.state["optimizer_steps"] == 1
    assert reader.tensor("layers.0.ffn.down", "momentum").any()
