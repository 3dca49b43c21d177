"""Projection onto integer codes in the metric: successive interference cancellation.

The nearest ``grid`` point to W (m x n) in ``d = tr(G (W - W^) H (W - W^)^T)`` is sought, with ``G = diag(g^2)`` and the
lower Cholesky factor ``H = L L^T``. With the errors ``e_k = w_k - w^_k`` of the columns,

    d = sum_i g_i^2 sum_j L_jj^2 (t_ij - w^_ij)^2,       t_j = w_j + sum_{k>j} e_k L_kj / L_jj.

So columns are rounded from the last to the first, each target t_j absorbing the errors of those already fixed: Babai's
nearest plane (Combinatorica 6, 1986). GPTQ (Frantar et al., arXiv 2210.17323) is the same recursion on the inverse of
H, with the columns in reversed order.

With **step_ij = c / (L_jj g_i)** every entry's error costs the same c^2 / 12 whatever it weighs: reverse water-filling,
where rates follow importance, zeros appear where nothing is lost, and c alone governs a whole model.

Everything here runs in units of the steps. With ``v = w / step``, codes z and ``u = v - z``,

    t_j = v_j + sum_{k>j} u_k N_kj,                  N_kj = L_kj step_k / (L_jj step_j),

and rows do not touch one another: they may be sampled, stacked for several c, or shared out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ColumnRounder = Callable[[Tensor, int], Tensor]
"""Chooses the codes of one column: (targets in steps, float32 (m,); the column's index) -> integers (m,).

All targets of a column are known at once and do not depend on one another, so that a rounder may look at all of
them: to the nearest, with a dead zone, or along a trellis."""

BlockRounder = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Chooses the codes of a block of b columns, the last one first: (targets (b, m), which hold the errors of the columns
after the block; v (b, m); N within the block (b, b); index of the first column) -> integers and errors u, both (b, m)
and float32. All are stored by columns."""

BLOCK = 64
"""Columns whose targets are updated one by one; all columns before them are updated by one product per block."""


def nearest(targets: Tensor, column: int) -> Tensor:
    """Return the nearest integers, whatever the column."""
    return targets.round()


def interference(cholesky: Tensor, steps: Tensor) -> Tensor:
    """Return ``N_kj = L_kj step_k / (L_jj step_j)``, float32 (n, n), unit lower triangular.

    Args:
        cholesky: the lower factor L of H, (n, n).
        steps: the columns' steps, (n,) or (1,); a common factor does not matter.
    """
    steps = steps.to(cholesky.dtype).expand(len(cholesky))
    return (cholesky * (steps[:, None] / (cholesky.diagonal() * steps))).float()


def column_by_column(rounder: ColumnRounder) -> BlockRounder:
    """Return what rounds a block with ``rounder``, a column at a time."""

    def block(targets: Tensor, values: Tensor, within: Tensor, start: int) -> tuple[Tensor, Tensor]:
        codes, errors = torch.empty_like(values), torch.zeros_like(values)
        for j in range(len(values) - 1, -1, -1):
            t = torch.addmv(targets[j], errors[j + 1 :].T, within[j + 1 :, j])
            codes[j] = rounder(t, start + j)
            errors[j] = values[j] - codes[j]
        return codes, errors

    return block


def cancel_and_round(values: Tensor, interference: Tensor, rounder: BlockRounder) -> Tensor:
    """Round ``values`` to integers in the metric, columns from the last to the first.

    Args:
        values: v = w / step, float32 (m, n).
        interference: N of :func:`interference`.
        rounder: chooses the codes of a block of columns.

    Returns:
        The codes, float32 (m, n), stored by columns.
    """
    v = values.T.contiguous()  # by columns, so that every operation below runs over contiguous memory
    codes = torch.empty_like(v)
    targets = v.clone()
    for end in range(len(v), 0, -BLOCK):
        start = max(end - BLOCK, 0)
        within = interference[start:end, start:end]
        codes[start:end], errors = rounder(targets[start:end], v[start:end], within, start)
        targets[:start].addmm_(interference[start:end, :start].T, errors)
    return codes.T


def round_in_metric(
    weight: Tensor, steps: Tensor, rows: Tensor, cholesky: Tensor | None, rounder: ColumnRounder | None = None
) -> Tensor:
    """Return the integer codes Z of ``W ~ diag(rows) Z diag(steps)``, float32 (m, n).

    Args:
        weight: W, (m, n).
        steps: float (n,) or (1,), exactly as they will be stored.
        rows: float (m,) or (1,), likewise.
        cholesky: lower factor of H, (n, n); None for the identity, where columns do not touch.
        rounder: chooses a column's codes; to the nearest if None.
    """
    values = weight.float() / (rows.float()[:, None] * steps.float())
    if cholesky is not None:
        return cancel_and_round(values, interference(cholesky, steps), column_by_column(rounder or nearest))
    if rounder is None:
        return values.round()
    columns = values.T.contiguous()
    return torch.stack([rounder(column, j).to(values.dtype) for j, column in enumerate(columns)]).T
