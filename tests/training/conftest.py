"""The corpus and the ranks that tests of training have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.tiny import TINY, Pool, Trained, overrides, shared_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with a corpus, prepared by the first test that needs it."""
    return shared_corpus(tmp_path_factory)


def _pool(world: int, factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(world, factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory) -> Iterator[Pool]:
    """One process that is the only rank of its group."""
    yield from _pool(1, tmp_path_factory)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Iterator[Pool]:
    """Two processes joined by gloo."""
    yield from _pool(2, tmp_path_factory)


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory) -> Iterator[Pool]:
    """Four processes joined by gloo."""
    yield from _pool(4, tmp_path_factory)


@pytest.fixture(scope="session")
def no_group(tmp_path_factory) -> Iterator[Pool]:
    """A process without launcher and without process group."""
    yield from _pool(0, tmp_path_factory)


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request) -> Pool:
    """One rank, then two."""
    return request.getfixturevalue("one_rank" if request.param == 1 else "two_ranks")


@pytest.fixture(scope="session")
def trained(corpus, one_rank, two_ranks, tmp_path_factory) -> Callable[..., Trained]:
    """A function that trains 10 steps on `world` ranks, once for the same arguments."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.cache
    def train(world: int, zero: str, precision: str = "fp32", accumulation: int = 1) -> Trained:
        micro = TINY["global_batch_size"] // world // accumulation
        arguments = overrides(corpus, zero=zero, precision=precision, micro_batch_size=micro, optim__clip=0.5)
        path = folder / f"{world}-{zero}-{precision}-{accumulation}"
        steps = [["train", 5], ["save", str(path)], ["train", 5], ["save", str(path)]]
        results = (one_rank if world == 1 else two_ranks).run("script", arguments=arguments, steps=steps)
        return Trained(results, arguments, path / "step_00000005", path / "step_00000010")

    return train
