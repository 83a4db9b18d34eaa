"""Weights on disk: names and layout, what is refused, and that no damage goes unseen."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from conf.errors import UserError
from model.weights import CheckpointReader, checkpoints, damage, from_disk, load_weights, newest_intact, to_disk


@pytest.fixture
def decoder(build):
    return build("swiglu", dtype=torch.float32)


@pytest.fixture
def checkpoint(decoder, write_checkpoint, tmp_path):
    return write_checkpoint(decoder, tmp_path, 100)


def test_gate_and_up_are_two_tensors_on_disk(decoder):
    up = decoder.layers[1].ffn.up.detach()
    stored = to_disk("layers.1.ffn.up", up)
    assert list(stored) == ["layers.1.ffn.gate", "layers.1.ffn.up"]
    assert torch.equal(stored["layers.1.ffn.gate"], up[0])
    assert torch.equal(stored["layers.1.ffn.up"], up[1])
    ungated = torch.randn(72, 32)
    assert list(to_disk("layers.1.ffn.up", ungated)) == ["layers.1.ffn.up"]
    assert list(to_disk("layers.1.ffn.down", ungated)) == ["layers.1.ffn.down"]


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "qk_norm": True}], ids=str)
def test_what_is_written_reads_back_equal(build, write_checkpoint, tmp_path, arm, model):
    saved = build(arm, dtype=torch.float32, seed=1, **model)
    folder = write_checkpoint(saved, tmp_path, 7)
    other = build(arm, dtype=torch.float32, seed=2, **model)
    state = load_weights(other, folder)
    assert state == {"step": 7}
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), other.parameters(), strict=True))
    names = set(CheckpointReader(folder)._files)
    assert ("layers.0.ffn.gate" in names) == saved.layers[0].ffn.gated
    assert ("head.weight" in names) == (not saved.shape.tied)


def test_a_suffix_names_the_state_of_the_optimizer(checkpoint):
    class Stored:
        folder = checkpoint

        def tensor(self, name: str) -> torch.Tensor:
            return {"ffn.gate.exp_avg": torch.zeros(2, 3), "ffn.up.exp_avg": torch.ones(2, 3)}[name]

    moment = from_disk("ffn.up", (2, 2, 3), Stored(), ".exp_avg")
    assert moment.tolist() == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]


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
    assert "layers.0.ffn.gate" in CheckpointReader(checkpoint)
    assert "layers.9.ffn.gate" not in CheckpointReader(checkpoint)


def test_an_untouched_checkpoint_has_no_damage(checkpoint):
    assert damage(checkpoint) == ""


FILES = ["state.json", "weights_0.safetensors", "weights_1.safetensors"]


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
    assert damage(checkpoint) == f"{name} is missing"


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
    (paths[100] / "weights_0.safetensors").write_bytes(b"")
    found, passed_over = newest_intact(tmp_path)
    assert found == paths[20]
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
