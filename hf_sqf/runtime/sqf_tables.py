"""Products with block codebooks by look-up tables.

Where every block of a row of W is one of K atoms, the products of x's blocks with all atoms are computed once, and
each output sums up those that its row names: m . n / d additions instead of m . n products.
"""

from __future__ import annotations

import numpy as np

from .sqf_jit import jit


@jit
def sum_up(table: np.ndarray, indices: np.ndarray, rows: np.ndarray, y: np.ndarray) -> None:
    """Set ``y_i = sum_j rows_ij . table[j, indices_ij]``.

    Args:
        table: float32 (blocks, K).
        indices: unsigned integers (m, blocks), below K.
        rows: float32 (m, blocks), or (1, 1) for a factor that all have in common.
        y: float32 (m,), to fill.
    """
    m, blocks = indices.shape
    single = rows.size == 1
    whole = blocks // 4 * 4
    for i in range(m):
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        index = indices[i]
        if single:
            for j in range(0, whole, 4):  # four sums: each addition would wait for the last
                a += table[j, index[j]]
                b += table[j + 1, index[j + 1]]
                c += table[j + 2, index[j + 2]]
                d += table[j + 3, index[j + 3]]
            for j in range(whole, blocks):
                a += table[j, index[j]]
            y[i] = (a + b + c + d) * rows[0, 0]
        else:
            for j in range(0, whole, 4):
                a += table[j, index[j]] * rows[i, j]
                b += table[j + 1, index[j + 1]] * rows[i, j + 1]
                c += table[j + 2, index[j + 2]] * rows[i, j + 2]
                d += table[j + 3, index[j + 3]] * rows[i, j + 3]
            for j in range(whole, blocks):
                a += table[j, index[j]] * rows[i, j]
            y[i] = a + b + c + d
