"""Dependent quantization: the best path of one column through the trellis (Viterbi's algorithm).

The targets of a column are known at once and independent in the metric, so that the codes of least

    sum_i (t_i - u_i)^2 + price * bits(k_i)

over all paths of the machine (:mod:`hf_sqf.runtime.sqf_trellis`) are found exactly over the candidates
of each step, in time proportional to rows times states. Units are those of the fine step: t = w / step.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..runtime.sqf_trellis import machine

FAR = np.float32(1e30)


@cache
def sources(states: int) -> NDArray[np.uint32]:
    """Return how the states of a machine are entered, (2, states): from which state with each parity.

    The lower half of the states is entered from states on grid 0, the upper half from those on grid 1.
    """
    next_state, grid = machine(states)
    found = np.argsort(next_state, axis=0, kind="stable").T
    assert np.array_equal(grid[found], np.broadcast_to(np.arange(states) >= states // 2, (2, states)))
    return np.ascontiguousarray(found, dtype=np.uint32)


@njit(nogil=True, cache=True)
def _candidates(
    target: np.float32,
    rates: NDArray[np.float32],
    price: np.float32,
    costs: NDArray[np.float32],
    codes: NDArray[np.int32],
) -> None:
    """Find the best code on each grid (0, 1) of each parity: ``costs`` and ``codes`` at ``2 * grid + parity``."""
    size = abs(target)
    sign = 1 if target >= 0 else -1
    last = rates.shape[1] - 1
    for grid in range(2):
        for parity in range(2):
            position = (size + np.float32(grid)) * np.float32(0.5)
            nearest = 2 * int(np.floor((position - np.float32(parity)) * np.float32(0.5) + np.float32(0.5))) + parity
            nearest = max(nearest, parity)
            best = FAR
            chosen = 0
            # The nearest of its parity, the next one towards (or past) zero, and zero itself.
            for trial in range(3):
                k = nearest - 2 * trial
                if trial == 2:
                    k = 0
                if (trial == 2 and (parity == 1 or nearest <= 2)) or (trial == 1 and k < -1):
                    continue
                level = abs(k)
                point = np.float32(2 * level - grid if level > 0 else 0)
                error = size - (point if k >= 0 else -point)
                cost = error * error + price * rates[grid, min(level, last)]
                if cost < best:
                    best = cost
                    chosen = k
            costs[2 * grid + parity] = best
            codes[2 * grid + parity] = sign * chosen


@njit(nogil=True, cache=True)
def viterbi(
    targets: NDArray[np.float32],
    classes: NDArray[np.int32],
    rates: NDArray[np.float32],
    price: np.float32,
    entries: NDArray[np.uint32],
    out: NDArray[np.int32],
) -> float:
    """Write the fine-grid integers of the best path into ``out``; return its cost.

    Args:
        targets: float32 (m,), in units of the fine step.
        classes: int (m,), the class of each entry's probability model.
        rates: float32 (classes, 2, A + 1), bits of a code of magnitude 0 ... A on each grid, sign included;
            larger codes cost what A costs.
        price: float32, lambda: squared fine steps a bit.
        entries: uint32 (2, states), see :func:`sources`.
        out: int32 (m,).
    """
    rows, states = targets.shape[0], entries.shape[1]
    half = states // 2
    odd = np.empty((rows, states), np.bool_)
    codes = np.empty((rows, 4), np.int32)
    costs = np.empty(4, np.float32)
    total = np.full(states, FAR)
    total[0] = 0
    following = np.empty(states, np.float32)
    path_cost = 0.0
    for i in range(rows):
        _candidates(targets[i], rates[classes[i]], price, costs, codes[i])
        for grid in range(2):
            even_cost, odd_cost = costs[2 * grid], costs[2 * grid + 1]
            for s in range(grid * half, grid * half + half):
                first = total[entries[0, s]] + even_cost
                second = total[entries[1, s]] + odd_cost
                odd[i, s] = second < first
                following[s] = min(first, second)
        total, following = following, total
        if i % 16 == 15 or i == rows - 1:
            # Keeping the least near zero keeps float32 exact enough on columns of any length.
            least = total.min()
            path_cost += least
            for s in range(states):
                total[s] -= least
    state = np.uint32(np.argmin(total))
    for i in range(rows - 1, -1, -1):
        parity = np.int32(odd[i, state])
        grid = np.int32(state >= half)
        k = codes[i, 2 * grid + parity]
        out[i] = 2 * k - np.sign(k) * grid
        state = entries[parity, state]
    return path_cost


@njit(nogil=True, cache=True)
def _classes(rows: NDArray[np.int32], col: np.int32, rates: NDArray[np.float32], out: NDArray[np.int32]) -> None:
    """Write the classes of the entries of a column."""
    last = rates.shape[0] - 1
    for i in range(rows.shape[0]):
        out[i] = min(max(rows[i] + col, 0), last)


@njit(nogil=True, cache=True)
def viterbi_columns(
    targets: NDArray[np.float32],
    cols: NDArray[np.int32],
    rows: NDArray[np.int32],
    rates: NDArray[np.float32],
    price: np.float32,
    entries: NDArray[np.uint32],
    out: NDArray[np.int32],
) -> None:
    """Write the fine-grid integers of columns that do not touch, (n, m), into ``out``.

    Args:
        targets: float32 (n, m), in units of the fine step: a column a row.
        cols: int32 (n,), the columns' part of the class.
        rows: int32 (m,), the rows' part.
        rates, price, entries: see :func:`viterbi`.
        out: int32 (n, m).
    """
    classes = np.empty(rows.shape[0], np.int32)
    for j in range(targets.shape[0]):
        _classes(rows, cols[j], rates, classes)
        viterbi(targets[j], classes, rates, price, entries, out[j])


@njit(nogil=True, cache=True)
def viterbi_block(
    targets: NDArray[np.float32],
    values: NDArray[np.float32],
    within: NDArray[np.float32],
    cols: NDArray[np.int32],
    rows: NDArray[np.int32],
    rates: NDArray[np.float32],
    price: np.float32,
    entries: NDArray[np.uint32],
    codes: NDArray[np.float32],
    errors: NDArray[np.float32],
) -> None:
    """Round a block of columns from the last to the first, each absorbing the errors of those after it.

    The columns of :data:`.rounding.BlockRounder` in compiled code: from Python, calls take longer than columns do.

    Args:
        targets, values: float32 (b, m), in units of the fine step: a column a row.
        within: float32 (b, b), N of :func:`.rounding.interference`.
        cols, rows, rates, price, entries: see :func:`viterbi_columns`.
        codes, errors: float32 (b, m), written to.
    """
    width, height = values.shape
    target = np.empty(height, np.float32)
    classes = np.empty(height, np.int32)
    found = np.empty(height, np.int32)
    for j in range(width - 1, -1, -1):
        target[:] = targets[j]
        for k in range(j + 1, width):
            weight = within[k, j]
            for i in range(height):
                target[i] += errors[k, i] * weight
        _classes(rows, cols[j], rates, classes)
        viterbi(target, classes, rates, price, entries, found)
        for i in range(height):
            codes[j, i] = found[i]
            errors[j, i] = values[j, i] - np.float32(found[i])
