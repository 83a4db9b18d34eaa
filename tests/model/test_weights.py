"""Weights on disk: names and layout, what is refused, and that no damage goes unseen."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from kernels.common.errors import UserError
from model.health import damage
from model.manifest import file_hash, file_of
from model.parallel import Axis, Mesh, ShardSpec, full_shape, shard_parameter, shard_spec
from model.weights import (
    CheckpointReader,
    Piece,
    checkpoints,
    header_of,
    load_weights,
    write_rest,
    write_tensors,
)
from tests.training.tiny import newest_intact


@pytest.fixture
def decoder(build):
    return build("swiglu", dtype=torch.float32)


@pytest.fixture
def checkpoint(decoder, write_checkpoint, tmp_path):
    return write_checkpoint(decoder, tmp_path, 100)


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "qk_norm": True}], ids=str)
def test_what_is_written_reads_back_equal(build, write_checkpoint, tmp_path, arm, model):
    saved = build(arm, dtype=torch.float32, seed=1, **model)
    folder = write_checkpoint(saved, tmp_path, 7)
    other = build(arm, dtype=torch.float32, seed=2, **model)
    state = load_weights(other, folder)
    assert state == {"step": 7, "optimizer_steps": 0, "format": 2}
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), other.parameters(), strict=True))


def test_a_file_of_pieces_is_one_that_the_library_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.exp_avg": torch.randn(7), "c": torch.randn(2, 0)}
    entry = write_tensors(tmp_path / "x.safetensors", tensors, {"step": "7"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert entry == {
        "bytes": (tmp_path / "x.safetensors").stat().st_size,
        "blake2b": file_hash(tmp_path / "x.safetensors"),
    }


SPECS = [
    (ShardSpec(0, (12,)), (12, 5)),
    (ShardSpec(0, (12, 4, 4)), (20, 3)),  # queries, keys, values
    (ShardSpec(1, (8,)), (2, 8, 3)),  # gate and up
    (ShardSpec(1, (8,)), (6, 8)),
    (ShardSpec(0, (8,)), (8,)),
]


@pytest.mark.parametrize(("spec", "shape"), SPECS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_unshard_inverts_shard(spec, shape, size):
    full = torch.arange(math.prod(shape)).view(shape)
    shards = [spec.shard(full, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(spec.unshard(shards), full)
    if spec.sections == (12, 4, 4) and size == 2:  # the second rank has the second half of each section
        assert shards[1][:, 0].tolist() == [3 * row for row in (6, 7, 8, 9, 10, 11, 14, 15, 18, 19)]


def write_pieces(folder, full, spec, size, replicas):
    """Write a tensor as `size` tensor ranks x `replicas` would: each a range of its flattened shard."""
    folder.mkdir()
    state = {"step": 1, "optimizer_steps": 0}
    index, files = {"shape": list(full.shape), "tensor": size, "cut": dataclasses.asdict(spec), "pieces": []}, {}
    for tensor in range(size):
        flat = spec.shard(full, tensor, size).flatten()
        for number, piece in enumerate(flat.tensor_split(replicas)):
            rank = tensor * replicas + number
            start = sum(len(p) for p in flat.tensor_split(replicas)[:number])
            index["pieces"].append([tensor, start, len(piece), rank])
            stored = piece.view_as(spec.shard(full, tensor, size)) if replicas == 1 else piece
            header = header_of(state, rank, [("w", Piece(*index["pieces"][-1]))])
            files[file_of(rank)] = write_tensors(folder / file_of(rank), {"w": stored}, header)
    write_rest(folder, {"w": index}, state, files)
    return CheckpointReader(folder)


@pytest.mark.parametrize(("spec", "shape"), SPECS)
@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_any_topology_reads_what_any_other_saved(tmp_path, spec, shape, size, replicas):
    full = torch.randn(shape)
    reader = write_pieces(tmp_path / "step_00000001", full, spec, size, replicas)
    assert damage(reader.folder) == ""
    assert torch.equal(reader.tensor("w"), full)
    for other in (1, 2, 4):
        for rank in range(other):
            flat = spec.shard(full, rank, other).flatten()
            for start, stop in ((0, len(flat)), (1, len(flat) - 1), (len(flat) // 3, len(flat) // 2 + 1)):
                assert torch.equal(reader.shard_range("w", "", spec, rank, other, start, stop), flat[start:stop])


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_sharded_parameter_is_a_parameter_that_knows_its_full_shape(tensor):
    mesh = Mesh(tensor=Axis(0, tensor))
    parameter = shard_parameter(mesh, (2, 8, 3), 1)
    assert parameter.shape == (2, 8 // tensor, 3)
    assert (shard_spec(parameter), full_shape(parameter, tensor)) == (ShardSpec(1, (8,)), (2, 8, 3))
    assert parameter.tensor_model_parallel == (tensor > 1)
    module = nn.Module()
    module.weight = parameter
    assert list(module.parameters()) == [parameter]
    assert shard_spec(module.to(torch.bfloat16).weight) == ShardSpec(1, (8,))
    assert shard_spec(nn.Parameter(torch.empty(3))) is None


def test_a_piece_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "step_00000001"
    write_pieces(folder, torch.randn(8, 3), ShardSpec(0, (8,)), 2, 2)
    index = json.loads((folder / "index.json").read_text())
    del index["w"]["pieces"][1]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds 6 of 12 elements of w"):
        CheckpointReader(folder).tensor("w")


def test_a_checkpoint_of_another_format_is_refused(checkpoint):
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(UserError, match="has checkpoint format 1, and this version reads 2"):
        CheckpointReader(checkpoint)


def test_a_checkpoint_of_another_model_is_refused(build, checkpoint):
    with pytest.raises(
        UserError, match=r"another shape: layers.0.attention.qkv is \(64, 32\) there and \(96, 32\) here"
    ):
        load_weights(build(n_kv_heads=4), checkpoint)
    with pytest.raises(UserError, match=r"holds no layers\.2"):
        load_weights(build(n_layers=3), checkpoint)
    with pytest.raises(UserError, match=r"holds no layers\.0\.attention\.q_norm\.weight"):
        load_weights(build(qk_norm=True), checkpoint)
    with pytest.raises(UserError, match="another shape"):
        load_weights(build("relu"), checkpoint)


def test_an_untouched_checkpoint_has_no_damage(checkpoint):
    assert damage(checkpoint) == ""


FILES = ["state.json", "index.json", "rank_00000.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen_wherever_it_is(checkpoint, name):
    path = checkpoint / name
    whole = path.read_bytes()
    for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert damage(checkpoint) == f"{name} does not have the contents that were saved"
    path.write_bytes(whole)
    assert damage(checkpoint) == ""


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_longer_or_missing_is_seen(checkpoint, name):
    path = checkpoint / name
    whole = path.read_bytes()
    for content in (whole[:-1], b"", whole + b"\x00"):
        path.write_bytes(content)
        assert damage(checkpoint) == f"{name} has {len(content)} bytes, not {len(whole)}"
    path.unlink()
    assert damage(checkpoint) == f"{name} is missing"
    path.mkdir()
    assert damage(checkpoint) == f"{name} is not a regular file"
    path.rmdir()
    os.mkfifo(path)
    assert damage(checkpoint) == f"{name} is not a regular file"


def test_no_flipped_bit_of_the_manifest_crashes_or_passes(checkpoint):
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 7)
        path.write_bytes(flipped)
        # A flip that the format does not mind (a space that becomes a tab) leaves the same records.
        try:
            same = json.loads(flipped) == json.loads(whole)
        except ValueError:
            same = False
        assert bool(damage(checkpoint)) != same, (place, bytes(flipped))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"{}", b'{"files": []}', b'{"files": {"a": 1}}', b"\xff"]
)
def test_a_manifest_that_is_none_is_damage(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    assert damage(checkpoint) == "manifest.json is missing or unreadable"
    (checkpoint / "manifest.json").unlink()
    assert damage(checkpoint) == "manifest.json is missing or unreadable"


def test_the_newest_intact_checkpoint_is_found(decoder, write_checkpoint, tmp_path):
    assert newest_intact(tmp_path / "missing") == (None, [])
    paths = {step: write_checkpoint(decoder, tmp_path, step) for step in (5, 20, 100, 123456789)}
    assert list(checkpoints(tmp_path)) == [paths[step] for step in (123456789, 100, 20, 5)]
    assert newest_intact(tmp_path) == (paths[123456789], [])
    (paths[123456789] / "state.json").unlink()
    (paths[100] / "rank_00000.safetensors").write_bytes(b"")
    actual, passed_over = newest_intact(tmp_path)
    assert actual == paths[20]
    assert [str(paths[step]) in line for step, line in zip((123456789, 100), passed_over, strict=True)] == [True, True]
    assert "state.json is missing" in passed_over[0]
    for step in (5, 20):
        (paths[step] / "manifest.json").unlink()
    assert newest_intact(tmp_path)[0] is None
    assert len(newest_intact(tmp_path)[1]) == 4


def test_what_is_not_called_like_a_checkpoint_is_none(checkpoint, tmp_path):
    for name in (".step_00000200.123.tmp", "step_00000200 (copy)", "step_x", "step_", "last"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    assert list(checkpoints(tmp_path)) == [checkpoint]


def test_reading_executes_nothing_and_needs_no_pickle(checkpoint):
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118
    assert not [path for path in checkpoint.iterdir() if path.suffix not in (".safetensors", ".json")]


def test_a_copied_parameter_is_sharded_alike():
    for size in (1, 2):
        parameter = shard_parameter(Mesh(tensor=Axis(0, size)), (4, 3), 0)
        parameter.requires_grad_(False)
        model = torch.nn.Module()
        model.first = model.second = parameter
        copied = copy.deepcopy(model)
        assert copied.first is copied.second
        assert copied.first is not parameter
        assert shard_spec(copied.first) == ShardSpec(0, (4,))
        assert copied.first.tensor_model_parallel == (size > 1)
        assert not copied.first.requires_grad
        assert full_shape(copied.first, size) == (4, 3)
