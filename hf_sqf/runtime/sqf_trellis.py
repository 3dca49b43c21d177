"""The state machine of dependent (trellis-coded) quantization.

Each code ``k`` of a column is reconstructed on one of two interleaved grids, in units of the fine step:

    Q0:  u = 2k                 (... -4, -2, 0, 2, 4 ...)
    Q1:  u = 2k - sign(k)       (... -3, -1, 0, 1, 3 ...)

A machine that starts in state 0 at the top of the column and moves by the parity of ``k`` says which
grid comes next (as in VVC, ITU-T H.266 8.7.3, and the Neural Network Coding standard, ISO/IEC 15938-17).
Run time knows only the fine-grid integers ``u``.

The machines are Ungerboeck's rate-1/2 codes for amplitude modulation (IEEE Trans. Inf. Theory 28, 1982,
table I), which trellis-coded quantization takes over (Marcellin & Fischer, IEEE Trans. Commun. 38, 1990).
More states cost the encoder time and decoding nothing.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PARITY_CHECKS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
"""Number of states -> parity-check polynomials (h0, h1)."""

TRELLIS_STATES = tuple(_PARITY_CHECKS)
"""The numbers of states that a file may name."""


class Machine(NamedTuple):
    """A state machine.

    Attributes:
        next_state: int32 (states, 2), by the parity of the code.
        grid: int32 (states,), 0 or 1: the grid that a state reconstructs on.
    """

    next_state: NDArray[np.int32]
    grid: NDArray[np.int32]


@cache
def machine(states: int) -> Machine:
    """Return the machine with that many states.

    It is the systematic feedback encoder of the code in observer form: the registers w_1 ... w_v are the
    bits of the state; z0 = w_1 names the grid, z1 (the parity of the code) the coset on it.

    Raises:
        ValueError: no code of that size is known.
    """
    if states not in _PARITY_CHECKS:
        raise ValueError(f"trellis must be one of {TRELLIS_STATES}, not {states}")
    h0, h1 = _PARITY_CHECKS[states]
    memory = states.bit_length() - 1
    state = np.arange(states)
    grid = state & 1
    next_state = np.zeros((states, 2), np.int32)
    for parity in (0, 1):
        for i in range(1, memory + 1):
            shifted = state >> i & 1 if i < memory else 0
            bit = shifted ^ ((h0 >> i & 1) & grid) ^ ((h1 >> i & 1) & parity)
            next_state[:, parity] |= (bit << (i - 1)).astype(np.int32)
    return Machine(next_state, grid.astype(np.int32))
