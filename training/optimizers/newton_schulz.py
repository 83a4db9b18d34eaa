"""Matrices made nearly orthogonal by a Newton-Schulz iteration: the singular vectors stay, the singular values go to 1.

A step is an odd polynomial of degree five in the singular values, a s + b s^3 + c s^5, computed by matrix products alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Jordan et al. 2024 (kellerjordan.github.io/posts/muon): steep at 0, so that small singular values grow by 3.4445 a step; large
# ones end between 0.7 and 1.2, not at 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Polar Express (Amsel et al. 2025, arXiv 2505.16932): for each step the polynomial that is best after those before it, for
# singular values from 0.001 to 1.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Of every polynomial but the last: rounding may lift a singular value above 1, where it would grow.
_SAFETY = 1.01
_PRECISE = (torch.float32, torch.float64)


def coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each step: "quintic", the same in all, or "polar_express", whose last one repeats."""
    if name == "quintic":
        return [_QUINTIC] * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return [*safe, *[_POLAR_EXPRESS[-1]] * steps][:steps]


def orthogonalise(matrices: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Return U V^T, nearly, of each matrix U S V^T: (B, m, n) -> (B, m, n), in the dtype of `matrices`.

    Products run in that dtype. A matrix of zeros stays one.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # the products are of the short side
    # No singular value is larger than the root of the sum of all squares.
    precise = torch.promote_types(wide.dtype, torch.float32)
    norms = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True, dtype=precise)
    x = wide * (1 / (norms * _SAFETY + 1e-7)).to(wide.dtype)
    if wide.dtype in _PRECISE and _by_gram_is_less(wide.shape[1], wide.shape[2], len(polynomials)):
        x = _by_gram(x, polynomials)
        return x if wide is matrices else x.mT
    for a, b, c in polynomials:
        squares = torch.bmm(x, x.mT)  # (B, m, m)
        factors = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        x = torch.baddbmm(x, factors, x, beta=a)
    return x if wide is matrices else x.mT


def _by_gram_is_less(short: int, long: int, steps: int) -> bool:
    """Return whether iterating on the (m, m) products takes fewer FLOPs than iterating on the (m, n) matrices."""
    return 4 * short * long + (8 * steps - 6) * short**2 < steps * (4 * short * long + 2 * short**2)


def _by_gram(x: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Return what the iteration makes of x (B, m, n), which is the product of all its factors times x.

    The factors are polynomials of x x^T, so only (m, m) matrices are iterated. Small eigenvalues of x x^T are the squares of
    small singular values, which bf16 rounds away: there the iteration diverges.
    """
    gram, factors = torch.bmm(x, x.mT), None
    for number, (a, b, c) in enumerate(polynomials):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # this step's factor is rest, and a on the diagonal
        if factors is None:
            factors = rest.clone()
            factors.diagonal(dim1=1, dim2=2).add_(a)
        else:
            factors = torch.baddbmm(factors, factors, rest, beta=a)
        if number + 1 < len(polynomials):
            gram = torch.baddbmm(gram, gram, rest, beta=a)
            gram = torch.baddbmm(gram, gram, rest, beta=a)
    assert factors is not None, "there is at least one step"
    return torch.bmm(factors, x)
