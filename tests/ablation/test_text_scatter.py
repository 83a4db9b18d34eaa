"""The scatter of a difference over held-out documents, against a bootstrap and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ablation.statistics import Pair, Verdict, compare
from ablation.text_scatter import text_scatter
from kernels.common.json_files import DocumentLosses

SEEDS = range(5)


def measured(nats: np.ndarray, tokens: np.ndarray, text: str = "a") -> DocumentLosses:
    return DocumentLosses(1, text, nats.tolist(), tokens.tolist())


def two_arms(
    chance: np.random.Generator, documents: int, difference: float = 0.0, of_document: float = 0.1, of_seed: float = 0.0
) -> tuple[dict[int, DocumentLosses], dict[int, DocumentLosses]]:
    """Two arms whose losses differ by `difference`, by what each document adds to it, and by what each seed does."""
    tokens = chance.integers(100, 600, documents)
    own = difference + chance.normal(0, of_document, documents)  # nats per token
    base = {seed: tokens * (3 + chance.normal(0, 0.5, documents)) for seed in SEEDS}
    return (
        {seed: measured(nats + tokens * (own + chance.normal(0, of_seed)), tokens) for seed, nats in base.items()},
        {seed: measured(nats, tokens) for seed, nats in base.items()},
    )


def mean(losses: DocumentLosses) -> float:
    return sum(losses.nats) / sum(losses.tokens)


def test_the_standard_error_is_that_of_a_bootstrap_of_documents():
    chance = np.random.default_rng(0)
    own, base = two_arms(chance, 300)
    found = text_scatter(own, base)
    tokens = np.array(own[0].tokens)
    nats = np.mean([np.array(own[s].nats) - np.array(base[s].nats) for s in SEEDS], 0)
    draws = chance.integers(0, 300, (4000, 300))
    bootstrap = (nats[draws].sum(1) / tokens[draws].sum(1)).std()
    # The deviation of 4,000 draws has a relative standard error of 1 / sqrt(8000) = 1.1%.
    assert found.error == pytest.approx(bootstrap, rel=0.05)
    assert found.documents == 300
    assert 150 < found.freedom < 299


def test_a_document_that_outweighs_the_others_leaves_few_degrees_of_freedom():
    tokens = np.array([10_000, *[100] * 20])
    own, base = ({0: measured(tokens * loss, tokens)} for loss in (3.0 + 0.01 * np.arange(21), np.full(21, 3.0)))
    assert text_scatter(own, base).freedom < 0.5


def test_what_was_not_measured_on_one_text_is_unknown():
    own, base = two_arms(np.random.default_rng(1), 5)
    assert text_scatter(own, base) is not None
    assert text_scatter({1: own[1], 9: own[2]}, base) == text_scatter({1: own[1]}, {1: base[1]})
    assert text_scatter(own, {}) is None
    assert text_scatter(own, {9: base[0]}) is None
    assert text_scatter(own, base | {1: base[1]._replace(held_out="b")}) is None
    assert text_scatter(own, base | {1: base[1]._replace(tokens=base[1].tokens[::-1])}) is None
    assert text_scatter(own, base | {1: base[1]._replace(nats=[math.nan] * 5)}) is None
    assert text_scatter(*({0: DocumentLosses(1, "a", [3.0], [1])} for _ in range(2))) is None


def comparison_of(own, base, regret: float = 0.0):
    losses = [{seed: mean(of_seed) for seed, of_seed in side.items()} for side in (own, base)]
    return compare([Pair("arm", *losses, math.inf, "", regret, text_scatter(own, base))], 0.01)[0]


def test_a_verdict_says_whether_it_holds_for_other_text():
    chance = np.random.default_rng(2)
    everywhere = comparison_of(*two_arms(chance, 300, -0.1, of_document=0.1, of_seed=0.005))
    assert (everywhere.verdict, everywhere.text.holds) == (Verdict.BETTER, True)
    own, base = two_arms(chance, 8, -0.02, of_document=0.2, of_seed=0.001)
    here = comparison_of(own, base)
    assert here.verdict in (Verdict.BETTER, Verdict.WORSE)
    assert not here.text.holds
    assert here.text.p_holm > 0.05
    assert here.text.both[0] < 0 < here.text.both[1]
    same = comparison_of(*two_arms(chance, 300, 0.0, of_document=0.01, of_seed=0.002))
    assert (same.verdict, same.text.holds) == (Verdict.EQUIVALENT, True)


def test_its_error_is_that_of_seeds_rates_and_documents_together():
    own, base = two_arms(np.random.default_rng(3), 60, -0.1, of_seed=0.01)
    found, text = comparison_of(own, base, regret=0.004), text_scatter(own, base)
    of_seeds = math.hypot(found.deviation / math.sqrt(len(SEEDS)), 0.004)
    reach = (found.text.both[1] - found.text.both[0]) / 2
    error = math.hypot(of_seeds, text.error)
    freedom = error**4 / (of_seeds**4 / 4 + text.error**4 / text.freedom)
    assert reach == pytest.approx(error * stats.t.isf(0.025, freedom), rel=1e-12)
    documents = (found.text.interval[1] - found.text.interval[0]) / 2
    assert documents == pytest.approx(text.error * stats.t.isf(0.025, text.freedom), rel=1e-12)


def test_a_diverged_seed_leaves_no_word_on_other_text():
    own, base = two_arms(np.random.default_rng(4), 60, -0.1)
    losses = [{seed: mean(of_seed) for seed, of_seed in side.items()} for side in (own, base)]
    losses[0][0] = math.nan
    assert compare([Pair("arm", *losses, 8.0, text=text_scatter(own, base))], 0.01)[0].text is None


@pytest.mark.parametrize("documents", [30, 300])
def test_equal_arms_are_hardly_ever_told_apart_on_other_text(documents):
    """Arms that differ on each document and on none in the mean: on this text a true difference, on other text a false one."""
    plans, false, here = 300, 0, 0
    for number in range(plans):
        found = comparison_of(*two_arms(np.random.default_rng([documents, number]), documents, of_seed=0.004))
        here += found.verdict in (Verdict.BETTER, Verdict.WORSE)
        false += found.verdict in (Verdict.BETTER, Verdict.WORSE) and found.text.holds
    assert here > 0.1 * plans
    assert false <= 0.05 * plans + 3 * math.sqrt(0.05 * 0.95 * plans)
