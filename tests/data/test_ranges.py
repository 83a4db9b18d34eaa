"""Samples left out: the order is that of the stream without them, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.batches import BatchStream, open_dataset
from data.ranges import SampleRanges
from kernels.common.errors import UserError


@pytest.mark.parametrize("text", ["0:1", "3:5,9:20", "9:20,3:5,4:10", "5:6,6:7,7:9", "100:200"])
def test_the_numbers_are_those_that_are_not_left_out_in_order(text):
    ranges = SampleRanges.parse(text)
    left_out = {n for part in text.split(",") for n in range(*map(int, part.split(":")))}
    expected = [n for n in range(300) if n not in left_out][:64]
    assert ranges.numbers(np.arange(64)).tolist() == expected
    assert [ranges.number(position) for position in range(64)] == expected
    assert [ranges.below(n) for n in range(64)] == [len([m for m in left_out if m < n]) for n in range(64)]
    assert SampleRanges.parse(str(ranges)) == ranges


def test_ranges_unite():
    one, other = SampleRanges.parse("3:5,9:20"), SampleRanges.parse("5:6,18:30,40:41")
    assert str(one | other) == "3:6,9:30,40:41"
    assert one | SampleRanges.parse(None) == one


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3", "is no range of samples: write A:B"),
        ("3:4:5", "is no range of samples"),
        ("a:b", "is no range of samples"),
        ("-3:4", "is no range of samples"),
        ("", "is no range of samples"),
        ("4:4", "4:4 holds no sample"),
        ("5:4", "5:4 holds no sample"),
    ],
)
def test_what_is_no_range_is_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        SampleRanges.parse(text)


@pytest.mark.parametrize(
    "ranges", [[3], ["ab"], [[1.5, 3]], [[0, math.inf]], [[0, 2**63]], [[1, 2, 3]], [["1", "2"]], [None]]
)
def test_what_a_checkpoint_cannot_have_left_out_is_an_error(ranges):
    with pytest.raises((ValueError, TypeError)):
        SampleRanges.of(ranges)


def test_only_samples_that_are_still_to_come_are_left_out():
    recorded = SampleRanges.parse("10:20")
    assert recorded.number(10) == 20
    assert str(recorded.extended(SampleRanges.parse("10:25"), 10)) == "10:25"
    assert recorded.extended(SampleRanges.parse("12:15"), 50) == recorded  # the same command again
    with pytest.raises(UserError, match="samples below 20 have been trained on already"):
        recorded.extended(SampleRanges.parse("9:12"), 10)


def test_the_stream_leaves_them_out_on_any_number_of_ranks(prepared):
    dataset, skipped = open_dataset(prepared), SampleRanges.parse("3:5,8:9")
    whole, without = BatchStream(dataset, 16, 0), BatchStream(dataset, 16, 0, skipped)
    expected = np.delete(whole.samples(0, 15), [3, 4, 8], 0)
    assert np.array_equal(without.samples(0, 12), expected)
    assert np.array_equal(np.concatenate([without.samples(first, 3) for first in range(0, 12, 3)]), expected)
