"""Factors of every structure, made up, for the tests of what stores them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hf_sqf.runtime.sqf_codec import chunk_rows
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_trellis import machine

STRUCTURES = ("grid", "grid_one_step", "trellis", "svd", "sparse_pca", "vq", "pgd", "svd+grid")


def path(rng: np.random.Generator, shape: tuple[int, int], states: int, scale: float = 1.5) -> np.ndarray:
    """Return fine-grid integers on a random path of a machine."""
    codes = np.rint(rng.laplace(scale=scale, size=shape)).astype(np.int32)
    return walk(codes, states)


def walk(codes: np.ndarray, states: int) -> np.ndarray:
    """Return the fine-grid integers of codes (m, n) down the columns, each chunk of rows from state 0."""
    next_state, grid = machine(states)
    points, column = np.empty_like(codes), np.zeros(codes.shape[1], np.int64)
    for i, k in enumerate(codes):
        if i % chunk_rows(*codes.shape) == 0:
            column[:] = 0
        points[i] = 2 * k - grid[column] * np.sign(k)
        column = next_state[column, k & 1].astype(np.int64)
    return points


def _made(name: str, m: int, n: int, seed: int) -> Factors:
    rng = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.rint(rng.normal(scale=scale, size=shape)).astype(np.int32))

    def grid(codes: torch.Tensor, trellis: int = 0) -> Term:
        return Term(codes, -30_000, normal(9, n), normal(4, m), trellis=trellis)

    one = torch.zeros(1, dtype=torch.int32)
    d, k = 4, 13
    blocks = -(-n // d)
    terms = {
        "grid": lambda: (grid(normal(1.5, m, n)),),
        "grid_one_step": lambda: (Term(normal(40, m, n), 17, one + 5, one),),
        "trellis": lambda: (grid(torch.from_numpy(path(rng, (m, n), 8)), trellis=8),),
        "svd": lambda: (Term(normal(20, m, 5), -9000, normal(2, 5), normal(3, m), normal(50, 5, n), 1),),
        "sparse_pca": lambda: (
            Term(normal(9, m, k) * (normal(1, m, k) > 1), 0, normal(2, k), one, normal(30, k, n), 1),
        ),
        "vq": lambda: (
            Term(
                torch.from_numpy(np.minimum(rng.geometric(0.2, m * blocks) - 1, k - 1)),
                -4096,
                normal(1, k),
                normal(3, m * blocks),
                normal(20, k, d),
                1,
                one_hot=True,
            ),
        ),
        "pgd": lambda: (Term(normal(0.5, m * blocks, k), 3, normal(2, k), normal(3, m * blocks), normal(30, k, d), 1),),
    }
    structure = {"grid_one_step": "grid", "trellis": "grid"}.get(name, name)
    return Factors((m, n), structure, sum((terms[part]() for part in name.split("+")), ()))


@pytest.fixture(scope="session")
def factors_of() -> Callable[..., Factors]:
    """Return a function (structure, m=24, n=30, seed=0) -> Factors."""
    return lambda name, m=24, n=30, seed=0: _made(name, m, n, seed)


def same(a: Factors, b: Factors) -> bool:
    """Whether two factors agree in every field, whatever the widths of their integers."""
    if (a.shape, a.structure, len(a.terms)) != (b.shape, b.structure, len(b.terms)):
        return False
    fields = ("scale", "step_resolution", "row_resolution", "one_hot", "trellis")
    for s, t in zip(a.terms, b.terms, strict=True):
        if any(getattr(s, f) != getattr(t, f) for f in fields):
            return False
        for x, y in ((s.codes, t.codes), (s.steps, t.steps), (s.rows, t.rows), (s.atoms, t.atoms)):
            if (x is None) != (y is None) or (x is not None and not torch.equal(x.long(), y.long())):
                return False
    return True


@pytest.fixture(scope="session")
def same_factors() -> Callable[[Factors, Factors], bool]:
    """Return :func:`same`."""
    return same


@pytest.fixture(scope="session")
def random_path() -> Callable[..., np.ndarray]:
    """Return :func:`path`."""
    return path


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> str:
    """Each structure in turn."""
    return str(request.param)
