"""Newton-Schulz makes matrices orthogonal, and its coefficients are those of their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.optimizers import exchange
from training.optimizers.exchange import Holding, MatrixPiece, deal
from training.optimizers.matrices import Matrix
from training.optimizers.muon import update_scale
from training.optimizers.newton_schulz import coefficients, orthogonalise

# After five steps the quintic leaves singular values in this interval (Jordan et al. 2024), if they begin above 0.01 or so.
QUINTIC = (0.65, 1.25)


def spectrum(rows: int, columns: int, least: float) -> torch.Tensor:
    """A matrix whose singular values are spread from `least` to 1, in double precision."""
    generator = torch.Generator().manual_seed(0)
    short = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, short, generator=generator, dtype=torch.float64))
    return u @ torch.diag(torch.logspace(np.log10(least), 0, short, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 60), (60, 24), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_vectors_stay_and_singular_values_go_to_one(rows, columns, dtype):
    matrix = spectrum(rows, columns, 0.1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    # The values begin divided by the norm of all, at most the root of their number.
    for name, steps, bounds in (("quintic", 5, QUINTIC), ("polar_express", 8, (0.98, 1.02))):
        result = orthogonalise(torch.stack([matrix, 1000 * matrix]).to(dtype), coefficients(name, steps))
        assert result.dtype == dtype
        assert result.shape == (2, rows, columns)
        noise = 0.03 if dtype == torch.bfloat16 else 1e-4
        for each in result.double():
            core = u.T @ each @ v.T
            values = core.diagonal()
            assert bounds[0] - noise < values.min()
            assert values.max() < bounds[1] + noise
            assert (core - torch.diag(values)).abs().max() < noise


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalise(torch.zeros(1, 3, 5), coefficients("quintic", 5)).any()


def best_polynomial(low: float, high: float) -> np.ndarray:
    """Return a, b, c of the odd polynomial of degree five that is nearest to 1 on an interval, by Remez's exchange."""
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    for _ in range(100):
        # Its errors at four points have one size, and alternating signs.
        matrix = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(matrix, np.ones(4))
        points[1:3] = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array([a, b, c])


def test_each_polynomial_of_polar_express_is_the_best_after_those_before_it():
    """As the paper computes them: for singular values from 0.001 to 1; below 0.024 of the largest, as for 0.024."""
    low, high = 1e-3, 1.0
    for safe in coefficients("polar_express", 6):
        a, b, c = np.array(safe) * [1.01, 1.01**3, 1.01**5]  # without the margin for rounding
        best = best_polynomial(max(low, 0.02407327424182761 * high), high)
        powers = np.array([[x, x**3, x**5] for x in (low, high)])
        best *= 2 / (powers @ best).sum()  # so that the new interval lies around 1
        assert (a, b, c) == pytest.approx(tuple(best), rel=1e-9)
        low = float(powers[0] @ best)
        high = 2 - low


def test_an_update_has_the_size_of_its_logical_matrix():
    assert update_scale("rms", 100, 400) == pytest.approx(4.0)
    assert update_scale("spectral", 400, 100) == pytest.approx(2.0)
    assert update_scale("spectral", 100, 400) == 1.0
    # "rms": the elements of an orthogonal m x n matrix have a root mean square of 1 / sqrt(max(m, n)).
    orthogonal, _ = torch.linalg.qr(torch.randn(300, 50))
    assert float(update_scale("rms", 300, 50) * orthogonal.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


def test_matrices_are_dealt_out_by_cost():
    assert deal([4.0, 5.0, 6.0, 7.0, 8.0], 2) == [0, 0, 1, 1, 0]
    assert deal([1.0], 3) == [0]
    assert sorted(deal([1.0] * 8, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pieces_are_the_overlap_of_a_rank_s_elements_with_each_matrix():
    matrices = [
        Matrix("w", 4, 10, 0, 0, 0, (0, 1)),
        Matrix("w", 6, 10, 4, 20, 0, (0, 1)),
        Matrix("v", 2, 10, 0, 0, 0, (1,)),
    ]
    assert [matrix.part_shape for matrix in matrices] == [(2, 10), (3, 10), (2, 10)]
    assert Holding(0, 0, {"w": (15, 10), "v": (0, 20)}).pieces(matrices) == [
        MatrixPiece(0, 15, 5),
        MatrixPiece(1, 0, 5),
    ]
    assert Holding(1, 0, {"w": (0, 0), "v": (5, 3)}).pieces(matrices) == [MatrixPiece(2, 5, 3)]


def test_a_round_holds_no_more_than_its_elements_unless_one_matrix_does(monkeypatch):
    monkeypatch.setattr(exchange, "ROUND_ELEMENTS", 100)
    small, large = (Matrix("w", rows, 10, 0, 0, 0, (0,)) for rows in (5, 20))
    owners = [0, 0, 0, 1, 1]
    assert exchange._rounds_of([small, small, small, large, small], owners, 2) == [0, 0, 1, 1, 0]
