"""Fine-grid integers <-> the codes of dependent quantization, along the columns of a matrix.

See :mod:`hf_sqf.runtime.sqf_trellis`: in units of the fine step, code k stands for ``u = 2k`` on grid Q0 and for
``u = 2k - sign(k)`` on Q1, and the parities of the codes above it in its column choose its grid.
"""

from __future__ import annotations

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_trellis import Machine


@jit
def _codes_compiled(
    points: np.ndarray, grid: np.ndarray, step: np.ndarray, codes: np.ndarray, states: np.ndarray
) -> int:
    column = np.zeros(points.shape[1], np.uint8)
    for i in range(points.shape[0]):
        for j in range(points.shape[1]):
            state, u = column[j], np.int64(points[i, j])
            q = np.int64(grid[state])
            k = (abs(u) + q) >> 1
            if 2 * k - (q if k else 0) != abs(u):
                return i * points.shape[1] + j
            states[i, j] = state
            codes[i, j] = k if u >= 0 else -k
            column[j] = step[state, k & 1]
    return -1


def _codes_vectors(points: np.ndarray, machine: Machine, codes: np.ndarray, states: np.ndarray) -> int:
    column = np.zeros(points.shape[1], np.uint8)
    for i, u in enumerate(points):
        q = machine.grid[column]
        magnitude = np.abs(u.astype(np.int64))
        k = (magnitude + q) >> 1
        wrong = np.flatnonzero(2 * k - q * (k > 0) != magnitude)
        if len(wrong):
            return i * points.shape[1] + int(wrong[0])
        states[i] = column
        codes[i] = np.where(u < 0, -k, k)
        column = machine.next_state[column, k & 1]
    return -1


def codes_of_points(points: np.ndarray, machine: Machine, compiled: bool = HAVE_NUMBA) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes k, int32 (m, n), and each one's state, uint8 (m, n), of fine-grid integers u (m, n).

    Raises:
        ValueError: u is not a path of the machine from state 0.
    """
    codes, states = np.empty(points.shape, np.int32), np.empty(points.shape, np.uint8)
    if compiled:
        wrong = _codes_compiled(points, machine.grid, machine.next_state, codes, states)
    else:
        wrong = _codes_vectors(points, machine, codes, states)
    if wrong >= 0:
        i, j = divmod(int(wrong), points.shape[1])
        raise ValueError(f"value {points[i, j]} at row {i}, column {j} is not on the grid of its column's state")
    return codes, states


@jit
def _points_compiled(codes: np.ndarray, grid: np.ndarray, step: np.ndarray, points: np.ndarray) -> None:
    column = np.zeros(codes.shape[1], np.uint8)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            state, k = column[j], np.int64(codes[i, j])
            q = np.int64(grid[state])
            points[i, j] = 2 * k - (q if k > 0 else (-q if k < 0 else 0))
            column[j] = step[state, k & 1]


def points_of_codes(codes: np.ndarray, machine: Machine, points: np.ndarray, compiled: bool = HAVE_NUMBA) -> None:
    """Write the fine-grid integers u of the codes k (m, n), from state 0, to ``points`` (m, n)."""
    if compiled:
        _points_compiled(codes, machine.grid, machine.next_state, points)
        return
    column = np.zeros(codes.shape[1], np.uint8)
    for i, k in enumerate(codes):
        points[i] = 2 * k.astype(np.int64) - machine.grid[column] * np.sign(k)
        column = machine.next_state[column, k & 1]
