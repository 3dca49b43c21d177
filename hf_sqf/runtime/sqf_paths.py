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
def _points_compiled(codes: np.ndarray, grids: np.ndarray, points: np.ndarray) -> None:
    for t in range(codes.size):
        k = np.int16(codes[t])
        points[t] = 2 * k - np.int16(grids[t]) * (np.int16(k > 0) - np.int16(k < 0))


def points_of_codes(codes: np.ndarray, grids: np.ndarray, compiled: bool = HAVE_NUMBA) -> np.ndarray:
    """Return the fine-grid integers u of codes k (t,) on the grids Q0 and Q1, ``grids`` uint8 (t,).

    Codes of int8 give int8 where that surely holds all points, or int16; others give int64.
    """
    if codes.dtype != np.int8:
        return 2 * codes.astype(np.int64) - grids * np.sign(codes).astype(np.int64)
    small = codes.size > 0 and codes.min() >= -64 and codes.max() <= 63
    points = np.empty(codes.shape, np.int8 if small else np.int16)
    if compiled:
        _points_compiled(codes, grids, points)
    else:
        points[:] = 2 * codes.astype(np.int16) - grids.astype(np.int16) * np.sign(codes)
    return points
