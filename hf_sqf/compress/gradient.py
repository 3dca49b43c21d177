"""Projected gradient descent on codes and dictionary, alternating.

Minimises ``f(Z, D) = tr((X - Z D) H (X - Z D)^T)`` (plus what codes cost, where they have a price) with Z and D
held to constraint sets, by

    Z <- P_Z(Z - df/dZ / L_Z),     D <- P_D(D - df/dD / L_D)

(Kuzmin et al., arXiv 2207.11048, section 3), where the L are the Lipschitz constants of the gradients: since f is
quadratic in each factor, a projected step of this length never raises f (Bolte et al., PALM, 2014). Momentum is
added, and given up for a step where it would raise f (O'Donoghue and Candes, arXiv 1204.3982).

One-hot codes are an index vector, as they are in a :class:`~hf_sqf.runtime.sqf_factors.Term`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .projections import Projection
from .solution import Status
from .spectrum import largest_eigenvalue, pseudo_inverse

Inner = Callable[[Tensor, Tensor, Tensor, Projection, "Tensor | None"], Tensor]
"""A step on the codes: (X, Z, D, P_Z, H) -> Z."""
_CHUNK = 1 << 19  # entries of a table of distances: few enough for the caches


@dataclass(frozen=True, eq=False)
class Descent:
    """Where the descent ended.

    Attributes:
        codes: Z, float64 (m, K); or indices, int64 (m,).
        dictionary: D, float64 (K, n).
        status: converged, or out of iterations.
        trace: f at the start and after each iteration; never rising.
    """

    codes: Tensor
    dictionary: Tensor
    status: Status
    trace: tuple[float, ...]


def multiply(codes: Tensor, dictionary: Tensor) -> Tensor:
    """Return ``Z D``."""
    return dictionary[codes] if codes.dim() == 1 else codes @ dictionary


def correlate(codes: Tensor, x: Tensor, atoms: int) -> Tensor:
    """Return ``Z^T X``, (K, n)."""
    if codes.dim() == 2:
        return codes.T @ x
    return torch.stack([torch.bincount(codes, x[:, j], atoms) for j in range(x.shape[1])], 1)


def gram(codes: Tensor, atoms: int) -> Tensor:
    """Return ``Z^T Z``, (K, K); for one-hot codes its diagonal alone, the usage of each atom, (K,)."""
    return codes.T @ codes if codes.dim() == 2 else torch.bincount(codes, minlength=atoms).double()


def weigh(x: Tensor, H: Tensor | None) -> Tensor:
    """Return ``X H``."""
    return x if H is None else x @ H


def objective(x: Tensor, codes: Tensor, dictionary: Tensor, H: Tensor | None) -> float:
    """Return ``f(Z, D)``."""
    error = x - multiply(codes, dictionary)
    return float((weigh(error, H) * error).sum())


def lipschitz(moments: Tensor) -> Tensor:
    """Return half the gradient's Lipschitz constant for each atom, (K,), given ``M = Z^T Z``, (K, K) or its diagonal.

    ``diag(L) >= M`` with L in proportion to M's diagonal: the largest eigenvalue of the correlations. Each atom
    gets a step of its own, the longest that its usage allows; with one-hot codes that is the cluster's mean.
    """
    if moments.dim() == 1:
        return moments
    scale = moments.diagonal().clamp_min(torch.finfo(moments.dtype).tiny).sqrt()
    largest = largest_eigenvalue(moments / (scale * scale[:, None]))
    return moments.diagonal() * largest.clamp_min(1.0)


def gradient_step(x: Tensor, codes: Tensor, dictionary: Tensor, P_Z: Projection, H: Tensor | None) -> Tensor:
    """Return ``P_Z(Z - df/dZ / L)``."""
    weighted = weigh(dictionary, H)  # D H
    largest = largest_eigenvalue(weighted @ dictionary.T)
    if float(largest) <= 0.0:
        return P_Z(codes)
    return P_Z(codes + (x - multiply(codes, dictionary)) @ weighted.T / largest)


def least_squares_codes(x: Tensor, dictionary: Tensor, H: Tensor | None) -> Tensor:
    """Return the codes without constraint that minimise f over a dictionary that stays, (m, K)."""
    weighted = weigh(dictionary, H)
    return x @ weighted.T @ pseudo_inverse(weighted @ dictionary.T)


def nearest_atom(x: Tensor, codes: Tensor, dictionary: Tensor, P_Z: Projection, H: Tensor | None) -> Tensor:
    """Return the index of each row's nearest atom: the exact minimiser over one-hot codes (Lloyd's assignment)."""
    weighted = weigh(dictionary, H)
    norms = 0.5 * (weighted * dictionary).sum(1)
    rows = max(1, _CHUNK // dictionary.shape[0])
    tables = (torch.addmm(norms[:, None], weighted, part.T, alpha=-1) for part in x.split(rows))
    return torch.cat([table.min(0).indices for table in tables])  # down the columns: several rows of x at a time


def dictionary_step(x: Tensor, codes: Tensor, dictionary: Tensor, P_D: Projection, H: Tensor | None) -> Tensor:
    """Return ``P_D(D - df/dD / L)``, every atom with its own L; an atom without use stays where it is."""
    atoms = dictionary.shape[0]
    constant = lipschitz(gram(codes, atoms))
    if H is not None:
        constant = constant * largest_eigenvalue(H)
    descent = weigh(correlate(codes, x - multiply(codes, dictionary), atoms), H)
    return P_D(dictionary + torch.where(constant > 0, 1.0 / constant, 0.0)[:, None] * descent)


def projected_gradient(
    x: Tensor,
    codes: Tensor,
    dictionary: Tensor,
    P_Z: Projection,
    P_D: Projection,
    H: Tensor | None = None,
    inner: Inner = gradient_step,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Descent:
    """Descend from codes and dictionary, which need not lie in their sets, to a stationary point within them.

    Args:
        x: X, float64 (m, n).
        codes: Z, float64 (m, K), or int64 (m,) for one-hot codes.
        dictionary: D, float64 (K, n).
        P_Z: projection onto the set of codes. One that is not separable must be nearest in the Euclidean norm.
        P_D: projection onto the set of dictionaries; it must treat entries apart from one another.
        H: (n, n); None for the identity.
        inner: the step on the codes.
        iterations: most iterations, of one step on each factor.
        tolerance: least relative fall of f for which to go on.
    """

    def f(Z: Tensor, D: Tensor) -> float:
        return objective(x, Z, D, H) + P_Z.penalty(Z)

    def step_codes(Z: Tensor, previous: Tensor, D: Tensor, momentum: float, value: float) -> tuple[Tensor, float, bool]:
        return _accept(lambda at: inner(x, at, D, P_Z, H), lambda Z: f(Z, D), Z, previous, momentum, value)

    def step_atoms(D: Tensor, previous: Tensor, Z: Tensor, momentum: float, value: float) -> tuple[Tensor, float, bool]:
        return _accept(lambda at: dictionary_step(x, Z, at, P_D, H), lambda D: f(Z, D), D, previous, momentum, value)

    Z = old_Z = P_Z(codes) if codes.dim() == 2 else codes
    D = old_D = P_D(dictionary)
    value = f(Z, D)
    trace, momentum = [value], 0.0
    for iteration in range(iterations):
        new, value, codes_moved = step_codes(Z, old_Z, D, momentum, value)
        Z, old_Z = new, Z
        new, value, atoms_moved = step_atoms(D, old_D, Z, momentum, value)
        D, old_D = new, D
        momentum = (iteration + 1) / (iteration + 4) if codes_moved and atoms_moved else 0.0
        trace.append(value)
        if trace[-2] - value <= tolerance * trace[-2]:
            return Descent(Z, D, Status.CONVERGED, tuple(trace))
    return Descent(Z, D, Status.ITERATION_LIMIT, tuple(trace))


def _accept(
    step: Callable[[Tensor], Tensor],
    f: Callable[[Tensor], float],
    point: Tensor,
    previous: Tensor,
    momentum: float,
    value: float,
) -> tuple[Tensor, float, bool]:
    """Step with momentum, else without, else not at all: the first that does not raise f.

    Returns:
        The accepted point, f there, and whether momentum may go on.
    """
    if momentum and point.is_floating_point():
        stepped = step(point + momentum * (point - previous))
        if (reached := f(stepped)) <= value:
            return stepped, reached, True
    stepped = step(point)
    reached = f(stepped)
    return (stepped, reached, not momentum) if reached <= value else (point, value, False)
