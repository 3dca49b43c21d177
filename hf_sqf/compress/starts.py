"""Where the descent starts: SVD or k-means. (The identity, the third, needs no computation.)"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectrum import eigh


def principal_of_moments(moments: Tensor, lower: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the right singular vectors of X in the metric H = L L^T, and the squared singular values.

    Truncating after K atoms gives the best approximation of rank K (Eckart and Young): ``Z = X H D^T``.

    Args:
        moments: ``X^T X``, float64 (n, n).
        lower: L, (n, n); None for the identity.

    Returns:
        D (n, n), atoms as rows with ``D H D^T = I``, and s^2 (n,), both from the largest s on.
    """
    power, vectors = eigh(moments if lower is None else lower.T @ moments @ lower)
    atoms = vectors.T.flip(0)
    if lower is not None:
        atoms = torch.linalg.solve_triangular(lower, atoms, upper=False, left=False)
    return _with_sign(atoms), power.flip(0).clamp_min(0.0)


def principal_of_rows(x: Tensor, H: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the same for a wide X (m, n), m < n, of whose atoms at most m have any power: D (m, n), s^2 (m,)."""
    power, vectors = eigh(x @ x.T if H is None else x @ H @ x.T)
    power = power.flip(0).clamp_min(0.0)
    floor = power[0] * len(x) * torch.finfo(x.dtype).eps
    atoms = (vectors.T.flip(0) @ x) * torch.where(power > floor, power, torch.inf).rsqrt()[:, None]
    return _with_sign(atoms), power


def _with_sign(atoms: Tensor) -> Tensor:
    """Make the largest entry of each atom positive, whatever the eigensolver chose."""
    largest = atoms.gather(1, atoms.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -atoms, atoms)


def kmeans_plus_plus(x: Tensor, count: int, seed: int, lower: Tensor | None = None) -> Tensor:
    """Return ``count`` rows of x (m, n) to start k-means from (Arthur and Vassilvitskii, 2007).

    Each is drawn with probability in proportion to the squared distance to the nearest one drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    y = x if lower is None else x @ lower
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = (y - y[chosen[0]]).square().sum(1)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    for draw in draws[1:]:
        total = distance.cumsum(0)
        chosen.append(min(int(torch.searchsorted(total, draw * total[-1])), len(x) - 1))
        distance = torch.minimum(distance, (y - y[chosen[-1]]).square().sum(1))
    return x[chosen]
