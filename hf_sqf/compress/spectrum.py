"""Eigenvalues of symmetric matrices, on one thread.

LAPACK's reduction to tridiagonal form makes its threads wait for one another at every column. Where something else
uses the processors too, each wait takes a slice of time: 8 s for a 576 x 576 matrix on two busy cores, where one thread
takes 0.06 s. Matrices here have a few thousand columns at most, and gain little from threads even on an idle machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .threads import one_thread


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,), rising, and eigenvectors (n, n), in columns, of a symmetric matrix (n, n)."""
    with one_thread():
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return the largest eigenvalue, (), of a symmetric matrix (n, n)."""
    with one_thread():
        return torch.linalg.eigvalsh(matrix)[-1]


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse (n, n) of a symmetric matrix (n, n)."""
    with one_thread():
        return torch.linalg.pinv(matrix, hermitian=True)
