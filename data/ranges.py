"""Samples that a run leaves out: ranges of their numbers in the stream, and what becomes of the order without them."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Sequence

import numpy as np

from kernels.common.errors import UserError

_RANGE = re.compile(r"(\d{1,18}):(\d{1,18})")
_LARGEST = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class SampleRanges:
    """Disjoint ranges (first, end) of sample numbers, `end` excluded, in increasing order. `|` unites two of them."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(ranges: Iterable[Sequence[int]]) -> SampleRanges:
        """Return ranges in any order, which may overlap.

        Raises:
            ValueError: one of them is no pair, or holds no sample that a stream could have.
            TypeError: one of them is no pair of whole numbers.
        """
        united: list[tuple[int, int]] = []
        for first, end in sorted((operator.index(first), operator.index(end)) for first, end in ranges):
            if not 0 <= first < end <= _LARGEST:
                raise ValueError(f"{first}:{end} holds no sample")
            if united and first <= united[-1][1]:
                united[-1] = united[-1][0], max(end, united[-1][1])
            else:
                united.append((first, end))
        return SampleRanges(tuple(united))

    @staticmethod
    def parse(text: str | None) -> SampleRanges:
        """Read `guard.skip_samples`: "A:B", or several such ranges separated by commas; None: no sample.

        Raises:
            UserError: it is written in another way.
        """
        if text is None:
            return SampleRanges()
        parts = [part.strip() for part in text.split(",")]
        if not all(map(_RANGE.fullmatch, parts)):
            raise UserError(
                f"guard.skip_samples={text} is no range of samples: write A:B, from sample A to below sample B"
            )
        try:
            return SampleRanges.of([int(number) for number in part.split(":")] for part in parts)
        except ValueError as error:
            raise UserError(f"guard.skip_samples={text}: {error}") from error

    def __or__(self, other: SampleRanges) -> SampleRanges:
        return SampleRanges.of((*self.ranges, *other.ranges))

    def __str__(self) -> str:
        return ",".join(f"{first}:{end}" for first, end in self.ranges)

    def below(self, number: int) -> int:
        """Return how many of the samples have a number below `number`."""
        return sum(max(0, min(end, number) - first) for first, end in self.ranges)

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples at positions of the stream without these samples: int64, of the same shape."""
        numbers = np.array(positions, np.int64)
        for first, end in self.ranges:
            numbers[numbers >= first] += end - first
        return numbers

    def number(self, position: int) -> int:
        """Return the number of the sample at one position."""
        return int(self.numbers(np.array([position]))[0])

    def extended(self, more: SampleRanges, position: int) -> SampleRanges:
        """Return these ranges and others, where `position` samples of the stream have been trained on already.

        Raises:
            UserError: the others would leave out samples before that, and so shift those that follow.
        """
        united, following = self | more, self.number(position)
        if united.below(following) != self.below(following):
            raise UserError(
                f"guard.skip_samples={more}: samples below {following} have been trained on already; "
                "go back to a checkpoint before them with resume_from=step_N"
            )
        return united


NO_SAMPLES = SampleRanges()
