"""The state machine of dependent (trellis-coded) quantization.

Two grids of step 2 interleave on the fine grid of integers u: Q0 holds ``2k``, Q1 holds ``2k - sign(k)``.
Which of them the next code of a column uses is the state of a small machine driven by the parity of ``k``
(Schwarz et al., *Hybrid video coding with trellis-coded quantization*, DCC 2019; the tables of 4 and 8 states
are those of VVC and of the Neural Network Coding standard, ISO/IEC 15938-17). Every column starts in state 0,
and starts again at the top of each chunk of rows (:func:`hf_sqf.runtime.sqf_codec.chunk_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit


@dataclass(frozen=True)
class Machine:
    """A state machine: ``quantizer_of_state`` (S,), 0 for Q0 and 1 for Q1, and ``next_state`` (S, 2) by parity."""

    quantizer_of_state: np.ndarray
    next_state: np.ndarray

    @property
    def states(self) -> int:
        """Number of states S."""
        return len(self.quantizer_of_state)


def _machine(next_state: list[tuple[int, int]], quantizer: list[int]) -> Machine:
    return Machine(np.array(quantizer, np.uint8), np.array(next_state, np.uint8))


MACHINES: dict[int, Machine] = {
    4: _machine([(0, 2), (2, 0), (1, 3), (3, 1)], [0, 0, 1, 1]),
    8: _machine([(0, 2), (7, 5), (1, 3), (6, 4), (2, 0), (5, 7), (3, 1), (4, 6)], [0, 1, 0, 1, 0, 1, 0, 1]),
}
"""The machines that a stream's header can name, by their number of states."""


@jit
def _codes_compiled(points, quantizer, step, codes, states):  # noqa: ANN001, ANN202
    column = np.zeros(points.shape[1], np.uint8)
    for i in range(points.shape[0]):
        for j in range(points.shape[1]):
            state, u = column[j], np.int64(points[i, j])
            q = quantizer[state]
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
        q = machine.quantizer_of_state[column].astype(np.int64)
        magnitude = np.abs(u.astype(np.int64))
        k = (magnitude + q) >> 1
        wrong = np.flatnonzero(2 * k - q * (k > 0) != magnitude)
        if len(wrong):
            return i * points.shape[1] + int(wrong[0])
        states[i] = column
        codes[i] = np.where(u < 0, -k, k)
        column = machine.next_state[column, k & 1]
    return -1


def codes_of_points(
    points: np.ndarray, machine: Machine, compiled: bool = HAVE_NUMBA
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes k, int32 (m, n), and each one's state, uint8 (m, n), of fine-grid integers u (m, n).

    Raises:
        ValueError: u is not a path of the machine from state 0.
    """
    codes, states = np.empty(points.shape, np.int32), np.empty(points.shape, np.uint8)
    if compiled:
        wrong = _codes_compiled(points, machine.quantizer_of_state, machine.next_state, codes, states)
    else:
        wrong = _codes_vectors(points, machine, codes, states)
    if wrong >= 0:
        i, j = divmod(int(wrong), points.shape[1])
        raise ValueError(f"value {points[i, j]} at row {i}, column {j} is not on the grid of its column's state")
    return codes, states


@jit
def _points_compiled(codes, quantizer, step, points):  # noqa: ANN001, ANN202
    column = np.zeros(codes.shape[1], np.uint8)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            state, k = column[j], np.int64(codes[i, j])
            q = np.int64(quantizer[state])
            points[i, j] = 2 * k - (q if k > 0 else (-q if k < 0 else 0))
            column[j] = step[state, k & 1]


def points_of_codes(
    codes: np.ndarray, machine: Machine, points: np.ndarray, compiled: bool = HAVE_NUMBA
) -> None:
    """Write the fine-grid integers u of the codes k (m, n), from state 0, to ``points`` (m, n)."""
    if compiled:
        _points_compiled(codes, machine.quantizer_of_state, machine.next_state, points)
        return
    column = np.zeros(codes.shape[1], np.uint8)
    quantizer = machine.quantizer_of_state.astype(np.int64)
    for i, k in enumerate(codes):
        points[i] = 2 * k.astype(np.int64) - quantizer[column] * np.sign(k)
        column = machine.next_state[column, k & 1]
