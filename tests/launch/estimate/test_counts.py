"""Parameters and FLOPs counted from the configuration, against the decoder itself and what torch counts while it computes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.estimate import live_tensors
from conf.keys import choices
from conf.load import load
from conf.optimizers import OPTIMIZERS
from conf.schema import ParallelConfig
from conf.shape import check_divisibility, shape_of
from kernels.common.errors import UserError
from launch.estimate.counts import (
    CHECKPOINTING,
    activation_bytes,
    attention_recomputed_flops,
    ffn_recomputed_flops,
    flops_per_token,
    host_bytes,
    logits_rows,
    parameters,
    peak_bytes,
    rank_parameters,
    state_bytes,
)
from model.decoder import Decoder
from model.parallel import Axis, Mesh
from tests.model.conftest import config_of
from tests.selection import quick

SHAPES = {
    "grouped": {},
    "multi-head": {"n_kv_heads": None},
    "tied": {"tie_embeddings": True},
    "qk-norm": {"qk_norm": True},
    "wide heads": {"head_dim": 12},
    "all": {"tie_embeddings": True, "qk_norm": True, "head_dim": 6, "n_kv_heads": 1, "n_layers": 3, "d_ff": 40},
}


def part_of(name: str) -> str:
    for part, mark in (("norms", "norm.weight"), ("embedding", "embedding."), ("output", "head."), ("ffn", ".ffn.")):
        if mark in name:
            return part
    return "attention"


def check_parameters(decoder: torch.nn.Module) -> None:
    counted = Counter()
    for name, parameter in decoder.named_parameters():
        counted[part_of(name)] += parameter.numel()
    predicted = parameters(decoder.shape)
    assert {part: count for part, count in predicted.items() if count} == dict(counted)
    assert sum(predicted.values()) == sum(parameter.numel() for parameter in decoder.parameters())
    assert decoder.shape.ffn[0].parameters(decoder.shape.d_model) * decoder.shape.n_layers == predicted["ffn"]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_decoder(build, shape):
    check_parameters(build(**SHAPES[shape]))


def test_parameters_are_those_of_the_decoder_for_every_arm(build, arm):
    check_parameters(build(arm))
    check_parameters(build(arm, **SHAPES["all"]))


def projections_of(run: Callable[[], object]) -> int:
    """Return the FLOPs of products of two matrices; one with a vector is a reduction, such as a norm may use."""

    def product(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
        return 2 * left[0] * left[1] * right[1] if min(left[0], right[1]) > 1 else 0

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: product}) as counter:
        run()
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arm", ["swiglu", "relu2"])
def test_flops_are_those_that_torch_counts(build, arm, shape):
    """Projections are `mm` and must agree exactly, forward and backward. Attention is another operator.

    There the conventions differ: a kernel computes blocks, or the whole square, and torch counts what it computes; this
    project counts the causal half, which the next test checks.
    """
    decoder, tokens = build(arm, **SHAPES[shape]), torch.zeros(2, 16, dtype=torch.int64)
    predicted = flops_per_token(decoder.shape, 16)
    scores = flops_per_token(decoder.shape, 16)["attention"] - 6 * parameters(decoder.shape)["attention"]
    projections = (sum(predicted.values()) - scores) * tokens.numel()
    forward = projections_of(lambda: decoder(tokens))
    both = projections_of(lambda: decoder(tokens).sum().backward())
    assert (forward, both) == (projections // 3, projections)


def test_attention_counts_what_a_causal_token_sees(build):
    shape, length = build().shape, 37
    forward = 0
    for position in range(length):
        seen = position + 1
        scores = mixed = 2 * shape.head_dim * seen  # a multiply-add is two
        forward += shape.n_layers * shape.n_heads * (scores + mixed)
    found = flops_per_token(shape, length)["attention"] - 6 * parameters(shape)["attention"]
    assert found * length == 3 * forward


def test_the_output_costs_the_same_tied_or_not(build):
    tied, own = (flops_per_token(build(tie_embeddings=tie).shape, 16) for tie in (True, False))
    assert tied == own
    assert tied["output"] == 6 * 64 * 32


# Of the published models, as counted from their weights.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama_1b": 1_100_048_384,  # TinyLlama
    "llama_3b": 3_212_749_824,  # Llama 3.2
}


@pytest.mark.parametrize("preset", choices("model"))
def test_a_preset_has_the_parameters_that_its_name_says_whatever_the_arm(preset):
    config = load([f"model={preset}"])
    total = sum(parameters(shape_of(config)).values())
    if preset in PUBLISHED:
        assert total == PUBLISHED[preset]
    number = preset.rpartition("_")[2]
    if number != preset:
        said = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
        assert abs(total / said - 1) < 0.11  # a name rounds 1.1 to 1
    config.ffn.formula = "relu(x) ** 2"
    assert sum(parameters(shape_of(config)).values()) == total  # an ungated arm is as large


@pytest.mark.parametrize("arm", ["swiglu", "prelu", "relu2"])
def test_a_tensor_rank_has_its_share_of_the_matrices_and_all_else(arm):
    whole = shape_of(config_of(arm, n_kv_heads=4, qk_norm=True))
    check_divisibility(whole, ParallelConfig(tensor=4))
    for size in (1, 2, 4):
        mesh = Mesh(tensor=Axis(0, size))
        part = Decoder(whole, config_of(arm, n_kv_heads=4, qk_norm=True).model, "sdpa", mesh=mesh)
        assert sum(p.numel() for p in part.parameters()) == rank_parameters(whole, size)


def test_groups_of_channels_are_sharded_as_the_channels_are():
    config = config_of(d_ff=48)
    config.ffn.formula, config.ffn.parameters = "gate*up*b", {"b": {"init": 1.0, "share": "group", "groups": 8}}
    whole = shape_of(config)
    assert [layer.learned for layer in whole.ffn] == [8, 8]
    for size in (1, 2, 4):
        part = Decoder(whole, config.model, "sdpa", mesh=Mesh(tensor=Axis(0, size)))
        assert part.layers[0].ffn.learned["b"].shape == (8 // size,)
        assert sum(p.numel() for p in part.parameters()) == rank_parameters(whole, size)
    with pytest.raises(UserError, match="groups=8 does not divide the d_ff=44 of ffn=swiglu into equal blocks"):
        check_divisibility(
            dataclasses.replace(whole, ffn=(dataclasses.replace(whole.ffn[0], d_ff=44),)), ParallelConfig()
        )


@pytest.mark.parametrize(
    ("dp_cp", "stage", "bf16", "micro_batches", "bytes_per_parameter"),
    [  # weights, gradients, optimizer; found by counting live tensors, `python -m bench.memory`
        (2, 0, False, 1, 4 + 4 + 8),
        (2, 1, True, 1, 2 + 1 + 6),
        (2, 1, True, 2, 2 + 4 + 6),
        (2, 1, False, 2, 4 + 4 + 6),
        (2, 2, True, 1, 2 + 1 + 6),
        (2, 2, True, 2, 2 + 2 + 6),
        (2, 2, False, 2, 4 + 2 + 6),
        (2, 3, True, 1, 1 + 1 + 6),
        (2, 3, True, 2, 1 + 2 + 6),
        (2, 3, False, 1, 2 + 2 + 6),
        (1, 1, True, 1, 2 + 6 + 12),
        (1, 1, True, 2, 2 + 4 + 12),
        (1, 1, False, 1, 4 + 4 + 8),
        (1, 2, True, 1, 2 + 2 + 12),
        (1, 2, False, 1, 4 + 4 + 12),
    ],
)
def test_bytes_of_weights_gradients_and_optimizer(dp_cp, stage, bf16, micro_batches, bytes_per_parameter):
    shape = shape_of(config_of())
    for tensor in (1, 2):
        found = state_bytes(shape, tensor, dp_cp, stage, bf16, micro_batches)
        assert sum(found.values()) == bytes_per_parameter * rank_parameters(shape, tensor)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_muon_keeps_one_number_per_parameter_of_a_matrix_and_adamw_two_of_the_rest(name):
    config = config_of()
    shape = shape_of(config)
    for tensor, dp_cp, stage in ((1, 1, 0), (2, 1, 0), (1, 2, 1), (2, 2, 3)):
        with torch.device("meta"):
            named = Decoder(shape, config.model, "sdpa", mesh=Mesh(tensor=Axis(0, tensor))).named_parameters()
            kept = sum(p.numel() * (1 if OPTIMIZERS[name].rule(n, p.ndim).name == name else 2) for n, p in named)
        found = state_bytes(shape, tensor, dp_cp, stage, False, optimizer=name)
        own = rank_parameters(shape, tensor)
        assert found["optimizer"] == 4 * (kept + (own if stage else 0)) / (dp_cp if stage else 1)
        assert found["optimizer"] < state_bytes(shape, tensor, dp_cp, stage, False)["optimizer"]


def test_an_offloaded_optimizer_takes_nothing_on_the_device():
    assert state_bytes(shape_of(config_of()), 1, 2, 2, offload=True)["optimizer"] == 0


@pytest.mark.parametrize("dp_cp", [1, 8])
def test_offloaded_weights_are_on_the_host_and_gathered_on_the_device(dp_cp):
    """A CPU has no other memory for them, so that nothing is saved there."""
    words = ["model=llama_1b", "zero=3", "micro_batch_size=1", f"global_batch_size={dp_cp}"]
    within, offloaded = load(words), load([*words, "zero.offload_parameters=true"])
    both = load([*words, "zero.offload_parameters=true", "zero.offload_optimizer=true"])
    shape = shape_of(within)
    own = rank_parameters(shape, 1)
    on_gpu, kept = (
        peak_bytes(within, shape, dp_cp, 1, 1, on_gpu=True),
        peak_bytes(offloaded, shape, dp_cp, 1, 1, on_gpu=True),
    )
    assert (on_gpu["weights"], kept["weights"]) == (2 * own / dp_cp, 0.0)
    assert kept["optimizer"] == on_gpu["optimizer"]
    if dp_cp > 1:
        assert kept == {**on_gpu, "weights": 0.0}
    computing = peak_bytes(
        load([*words, "zero.offload_parameters=true", "sequence_length=65536"]), shape, dp_cp, 1, 1, on_gpu=True
    )
    assert computing["buffers"] >= 2 * min(20 * 50_000_000, own)  # gathered: also those of a single rank
    assert peak_bytes(both, shape, dp_cp, 1, 1) == peak_bytes(within, shape, dp_cp, 1, 1)
    assert host_bytes(within, shape, dp_cp, True) == {"weights": 0.0, "optimizer": 0.0}
    assert host_bytes(both, shape, dp_cp, True) == {"weights": 2 * own / dp_cp, "optimizer": 12 * own / dp_cp}


def kept_bytes(decoder: Decoder, tokens: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of a forward pass, each storage once."""
    tables = decoder.layers[0].attention.rotary.tables(tokens.shape[1], tokens.device, torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in (tokens, *decoder.parameters(), *tables)}
    with live_tensors()(known) as live:
        returned = decoder(tokens, tokens)
        return live.live - sum(tensor.untyped_storage().nbytes() for tensor in returned)


@pytest.mark.parametrize("shape", quick(["grouped", "qk-norm", "wide heads"], "grouped", "qk-norm"))
@pytest.mark.parametrize("recompute", CHECKPOINTING)
@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_activations_are_those_that_autograd_keeps(build, arm, shape, recompute, dtype):
    decoder = build(arm, dtype=dtype, activation_checkpointing=recompute, **SHAPES[shape]).train()
    tokens, of = torch.randint(64, (2, 24)), decoder.shape
    count = tokens.numel()
    needs = activation_bytes(of, ParallelConfig(), count, dtype.itemsize, recompute)
    # Hidden states and their gradient, the gradient of the output's weights; the last norm's deviations.
    loss = dtype.itemsize * (2 * count * of.d_model + of.vocab_size * of.d_model) + 4 * count
    assert kept_bytes(decoder, tokens) == needs["layers"] + loss


def test_checkpointing_is_ordered_by_bytes_per_flop():
    """The figures of docs/training.md: of one layer of `llama3_8b`, bytes kept per token and FLOPs that come again."""
    kept, again = [], []
    for checkpointing in CHECKPOINTING:
        shape = shape_of(load(["model=llama3_8b", "ffn=swiglu", f"model.activation_checkpointing={checkpointing}"]))
        flops = flops_per_token(shape, 8192)
        kept.append(activation_bytes(shape, ParallelConfig(), 1, 2, checkpointing)["layers"] / 32)
        once_more = attention_recomputed_flops(shape, 8192) if checkpointing else 0
        whole = (flops["attention"] + flops["ffn"]) / 3
        again.append((whole if checkpointing is True else once_more + ffn_recomputed_flops(shape)) / 32)
    assert kept == pytest.approx([120.8e3, 73.7e3, 16.4e3, 8.2e3], rel=0.01)
    assert again == pytest.approx([0, 117e6, 352e6, 503e6], rel=0.01)
    saved = [(kept[i] - kept[i + 1]) / (again[i + 1] - again[i]) * 1000 for i in range(3)]
    assert saved == pytest.approx([0.40, 0.24, 0.05], abs=0.005)


def test_the_loss_takes_what_its_chunk_takes():
    shape = shape_of(load(["model=llama_1b"]))
    one, two = (activation_bytes(shape, ParallelConfig(tensor=t), 8192, 2) for t in (1, 2))
    states, output = 2 * 8192 * shape.d_model * 2, shape.vocab_size * shape.d_model
    assert one["loss"] == states + 6 * output + logits_rows(8192, shape.vocab_size, False) * shape.vocab_size * 2
    half = shape.vocab_size // 2
    assert two["loss"] == states + 3 * output + logits_rows(8192, half, False) * half * (2 + 4)
    one, two = (activation_bytes(shape, ParallelConfig(tensor=t), 8192, 2, on_gpu=True) for t in (1, 2))
    assert one["loss"] == states + 6 * output + logits_rows(8192, shape.vocab_size, True) * shape.vocab_size * 2
    assert two["loss"] == states + 3 * output + logits_rows(8192, half, True) * half * 2  # by the fused kernel
    in_fp32 = activation_bytes(shape, ParallelConfig(), 8192, 4)
    assert (
        in_fp32["loss"] == 2 * states + 4 * output + logits_rows(8192, shape.vocab_size, False) * shape.vocab_size * 4
    )


@pytest.mark.parametrize(("vocabulary", "rows"), [(4096, 65536), (32000, 8388), (128256, 4096)])
def test_a_gpu_takes_large_chunks_of_logits(vocabulary, rows):
    """With few rows, the sum of the weight's gradient would be read and written more often than the product takes."""
    assert logits_rows(10**6, vocabulary, True) == rows >= 4096
    assert logits_rows(100, vocabulary, True) == 100
    assert logits_rows(10**6, vocabulary, False) <= 1024


def test_peak_memory_is_of_the_moment_that_needs_most():
    small = load(["model=llama_1b", "zero=1", "micro_batch_size=1", "global_batch_size=8", "sequence_length=128"])
    large = load(["model=llama_1b", "zero=1", "micro_batch_size=8", "global_batch_size=64", "sequence_length=2048"])
    shape = shape_of(small)
    stepping, computing = peak_bytes(small, shape, 8, 1, 1), peak_bytes(large, shape, 8, 8, 1)
    assert stepping["activations"] == 0
    assert computing["activations"] == activation_bytes(shape, large.parallel, 8 * 2048, 2, False)["layers"]
    states = state_bytes(shape, 1, 8, 1)
    for peak in (stepping, computing):
        assert (peak["weights"], peak["optimizer"]) == (states["weights"], states["optimizer"])
    summed = peak_bytes(large, shape, 8, 8, 4)  # of four micro-batches the sum waits, in fp32
    assert summed["gradients"] == 4 * rank_parameters(shape, 1)
    recomputed = load(["model=llama_1b", "zero=1", "micro_batch_size=8", "global_batch_size=64", "sequence_length=2048",
                       "model.activation_checkpointing=true"])  # fmt: skip
    assert sum(peak_bytes(recomputed, shape, 8, 8, 1).values()) < sum(computing.values())
