"""Dependent quantization: the best path of one column through the trellis (Viterbi's algorithm).

The targets of a column are known at once and independent in the metric, so that the codes of least

    sum_i (t_i - u_i)^2 + price * bits(k_i)

over all paths of the machine (:mod:`hf_sqf.runtime.sqf_trellis`) are found exactly over the candidates
of each step, in time proportional to rows times states. Units are those of the fine step: t = w / step.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..runtime.sqf_trellis import machine

FAR = np.float32(1e30)


class Trellis(NamedTuple):
    """How the states of a machine are entered, laid out for the inner loop.

    Attributes:
        grid: uint32 (states,), the grid of each state.
        ways: uint32 (2, states), the two ways into each state; way ``parity * states + source``.
    """

    grid: NDArray[np.uint32]
    ways: NDArray[np.uint32]


@cache
def trellis(states: int) -> Trellis:
    """Return the trellis of the machine with that many states."""
    next_state, grid = machine(states)
    ways = np.argsort(next_state.T.reshape(-1), kind="stable").reshape(states, 2).T
    return Trellis(grid.astype(np.uint32), np.ascontiguousarray(ways, dtype=np.uint32))


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
    grid: NDArray[np.uint32],
    ways: NDArray[np.uint32],
    out: NDArray[np.int32],
) -> float:
    """Write the fine-grid integers of the best path into ``out``; return its cost.

    Args:
        targets: float32 (m,), in units of the fine step.
        classes: int (m,), the class of each entry's probability model.
        rates: float32 (classes, 2, A + 1), bits of a code of magnitude 0 ... A on each grid, sign included;
            larger codes cost what A costs.
        price: float32, lambda: squared fine steps a bit.
        grid, ways: a :class:`Trellis`.
        out: int32 (m,).
    """
    rows, states = targets.shape[0], grid.shape[0]
    entered = np.empty((rows, states), np.uint8)
    codes = np.empty((rows, 4), np.int32)
    costs = np.empty(4, np.float32)
    total = np.full(states, FAR)
    total[0] = 0
    arriving = np.empty(2 * states, np.float32)
    path_cost = 0.0
    for i in range(rows):
        _candidates(targets[i], rates[classes[i]], price, costs, codes[i])
        for s in range(states):
            arriving[s] = total[s] + (costs[2] if grid[s] else costs[0])
            arriving[states + s] = total[s] + (costs[3] if grid[s] else costs[1])
        for s in range(states):
            first = arriving[ways[0, s]]
            second = arriving[ways[1, s]]
            entered[i, s] = second < first
            total[s] = min(first, second)
        if i % 16 == 15 or i == rows - 1:
            # Keeping the least near zero keeps float32 exact enough on columns of any length.
            least = total.min()
            path_cost += least
            for s in range(states):
                total[s] -= least
    state = np.argmin(total)
    for i in range(rows - 1, -1, -1):
        way = ways[entered[i, state], state]
        state = way % states
        k = codes[i, 2 * grid[state] + way // states]
        out[i] = 2 * k - np.sign(k) * np.int32(grid[state])
    return path_cost
