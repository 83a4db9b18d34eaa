"""Batches: sample i is a function of the seed and i alone, an epoch visits every window once, blend weights are exact."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from data.batches import (
    BLOCK,
    IGNORED,
    BatchStream,
    Dataset,
    Part,
    _block_counts,
    _keys,
    held_out_count,
    held_out_windows,
    measured_windows,
    open_dataset,
    permute,
    sample_hash,
)
from data.shards import ShardSet, token_dtype, write_shard
from kernels.common.errors import UserError


@pytest.fixture(scope="module")
def dataset(prepared):
    return open_dataset(prepared)


@pytest.fixture(scope="module")
def blend(dataset):
    """Three parts, all of the same tokens, under names of their own."""
    (part,) = dataset.parts
    weights = {"a": 0.61, "b": 0.3, "c": 0.09}
    parts = [replace(part, name=name, weight=weight, corpus_hash=name) for name, weight in weights.items()]
    return replace(dataset, parts=parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_the_permutation_is_a_bijection(size):
    numbers = np.arange(size)
    first, second = (permute(numbers, size, _keys(8, "epoch", epoch)) for epoch in (0, 1))
    np.testing.assert_array_equal(np.sort(first), numbers)
    np.testing.assert_array_equal(np.sort(second), numbers)
    if size > 60:
        assert (first != second).mean() > 0.9
        assert (first != numbers).mean() > 0.9
        assert abs(np.corrcoef(first, numbers)[0, 1]) < 4 / size**0.5
        np.testing.assert_array_equal(first[5:9], permute(numbers[5:9], size, _keys(8, "epoch", 0)))


def test_the_permutation_of_a_large_corpus_takes_no_memory_and_never_changes():
    found = permute(np.array([0, 1, 2, 10**12]), 10**12 + 1, _keys(8, "fixed"))
    assert found.tolist() == [752370963619, 283165890167, 804099414587, 183609622607]


def test_the_same_samples_for_any_number_of_ranks_and_after_a_resume(dataset):
    stream = BatchStream(dataset, 16, seed=3)
    batch, steps = 8, 5
    whole = stream.samples(0, batch * steps)
    assert whole.shape == (batch * steps, 17)
    assert whole.dtype == np.int64
    for ranks in (1, 2, 4):
        share = batch // ranks
        for step in range(steps):
            fresh = BatchStream(dataset, 16, seed=3)  # as after a restart: no state but the count of samples
            rows = [fresh.samples(step * batch + rank * share, share) for rank in range(ranks)]
            np.testing.assert_array_equal(np.concatenate(rows), whole[step * batch : (step + 1) * batch])
            parts = [sample_hash(step * batch + rank * share, rows[rank]) for rank in range(ranks)]
            assert sum(parts) % 2**64 == sample_hash(step * batch, whole[step * batch : (step + 1) * batch])
    assert not np.array_equal(whole, BatchStream(dataset, 16, seed=4).samples(0, batch * steps))


def test_the_samples_of_a_corpus_never_change(tmp_path):
    documents = [[[(31 * n + 7 * d + i) % 999 for i in range(40 + d)] for d in range(30)] for n in range(4)]
    shards = [write_shard(tmp_path, "train", n, some, 1, 999, 1000) for n, some in enumerate(documents)]
    train = ShardSet([(tmp_path, shard) for shard in shards], token_dtype(1000))
    part = Part("made", tmp_path, 1.0, train, "fixed")
    made = Dataset(tmp_path, mock.Mock(), [part], ShardSet([], train.dtype), None, None, "fixed")
    assert sample_hash(0, BatchStream(made, 64, seed=5).samples(0, 300)) == 2683852234053298377


def test_an_epoch_takes_every_window_once_and_the_next_cuts_elsewhere(dataset):
    length = 16
    train = dataset.parts[0].train
    tokens = train.read(0, train.tokens)
    stream = BatchStream(dataset, length, seed=0)
    windows = train.tokens // length
    starts = []
    for epoch in range(2):
        rows = stream.samples(epoch * windows, windows)
        # Every token is a target as often as it stands in the corpus, but for fewer than `length` tokens.
        missing = np.bincount(tokens, minlength=400) - np.bincount(rows[:, 1:].ravel(), minlength=400)
        assert missing.min() >= 0
        assert missing.sum() == train.tokens % length
        starts.append(stream._epoch(0, epoch)[1])
    assert starts[0] % length != starts[1] % length
    first, second = stream.samples(0, windows), stream.samples(windows, windows)
    # Not none: behind the seam of the ring a cut may fall where the other epoch's does.
    assert len({row.tobytes() for row in first} & {row.tobytes() for row in second}) < windows / 2
    np.testing.assert_array_equal(stream.samples(windows - 3, 6), np.concatenate([first[-3:], second[:3]]))


def test_a_sample_is_a_stretch_of_the_corpus(dataset):
    train = dataset.parts[0].train
    text = train.read(-1, 2 * train.tokens).astype("<u2").tobytes()
    for row in BatchStream(dataset, 40, seed=1).samples(10, 20):
        assert row.astype("<u2").tobytes() in text


def test_the_weights_of_a_blend_are_exact_in_every_block(blend):
    stream = BatchStream(blend, 16, seed=0)
    orders = []
    for block in (0, 1, 77):
        part, nth = stream.parts_of(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert np.bincount(part).tolist() == [610, 300, 90]
        for p, count in enumerate((610, 300, 90)):
            assert nth[part == p].tolist() == list(range(block * count, (block + 1) * count))
        orders.append(part)
    assert not np.array_equal(orders[0], orders[1])
    across = np.concatenate(stream.parts_of(np.arange(995, 1005)))
    one_by_one = np.concatenate([np.ravel(stream.parts_of(np.array([i]))) for i in range(995, 1005)])
    np.testing.assert_array_equal(across, one_by_one.reshape(10, 2).T.ravel())
    np.testing.assert_array_equal(stream.samples(995, 10)[7:], stream.samples(1002, 3))
    # The parts hold the same text here, and still come in orders of their own.
    part, _ = stream.parts_of(np.arange(60))
    rows = stream.samples(0, 60)
    assert not np.array_equal(rows[part == 0][:5], rows[part == 1][:5])


def test_block_counts_by_largest_remainder():
    assert _block_counts([1 / 3, 1 / 3, 1 / 3]) == [334, 333, 333]
    assert _block_counts([0.1, 0.2, 0.7]) == [100, 200, 700]
    assert sum(_block_counts([0.12345, 0.5, 0.37655])) == BLOCK


def test_a_weight_too_small_to_keep_is_refused(blend):
    tiny = replace(blend, parts=[replace(blend.parts[0], weight=0.9999), replace(blend.parts[1], weight=0.0001)])
    with pytest.raises(UserError, match="part b of the blend"):
        BatchStream(tiny, 16, 0)


def test_a_sequence_longer_than_the_corpus_is_refused(dataset):
    tokens = dataset.parts[0].train.tokens
    with pytest.raises(UserError, match=f"sequence_length={tokens} is beyond the {tokens} tokens of shared"):
        BatchStream(dataset, tokens, 0)
    assert BatchStream(dataset, tokens - 1, 0).samples(0, 3).shape == (3, tokens)
    with pytest.raises(UserError, match="at least 1"):
        BatchStream(dataset, 0, 0)


@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_held_out_windows_have_every_token_as_a_target_once(dataset, length):
    tokens = dataset.held_out.read(0, dataset.held_out.tokens)
    batches = list(held_out_windows(dataset, length, rows=5))
    inputs, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    assert inputs.shape == targets.shape == (held_out_count(dataset, length), length)
    real = targets != IGNORED
    np.testing.assert_array_equal(targets[real], tokens)
    np.testing.assert_array_equal(inputs[real], np.concatenate([[dataset.eos_id], tokens[:-1]]))
    assert real.ravel()[: len(tokens)].all()  # only the end is filled up
    assert (inputs[~real] == dataset.eos_id).all()
    shares = [list(held_out_windows(dataset, length, which=range(r, len(inputs), 2))) for r in (0, 1)]
    assert sum((t != IGNORED).sum() for share in shares for _, t in share) == len(tokens)


def test_a_part_of_the_held_out_text_is_its_beginning_and_of_a_blend_spread_over_its_parts(dataset, blend):
    total = held_out_count(dataset, 7)
    for tokens, count in ((None, total), (7 * total + 1, total), (7 * 5 + 6, 5), (1, 1)):
        assert list(measured_windows(dataset, 7, tokens)) == list(range(count))
        assert len(measured_windows(blend, 7, tokens)) == count
    assert list(measured_windows(blend, 7, None)) == list(range(total))
    for count in (2, 5, total // 2 + 1, total - 1):
        spread = np.array(measured_windows(blend, 7, 7 * count))
        gaps = np.diff(np.append(spread, total))
        assert spread[0] == 0
        assert set(gaps) <= {total // count, total // count + 1}
        targets = [rows for _, rows in held_out_windows(blend, 7, which=spread.tolist())]
        assert (np.concatenate(targets) != IGNORED).sum() == 7 * count


def test_the_sample_hash_tells_order_and_content():
    rows = np.arange(12).reshape(3, 4)
    assert sample_hash(0, rows) != sample_hash(1, rows)
    assert sample_hash(0, rows) != sample_hash(0, rows[::-1])
    assert sample_hash(0, rows) == sample_hash(0, np.asfortranarray(rows).astype(np.int64))
    assert sample_hash(5, rows[:0]) == 0
    assert sample_hash(7, rows) == 15888289164653781052
