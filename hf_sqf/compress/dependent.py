"""Rounding along a trellis: dependent quantization of a whole weight, priced by the entropy coder itself.

Every column goes through Viterbi's algorithm (:mod:`.trellis`), whose bits are those of the coder's models. Models
depend on the codes and codes on the models, so that a first pass, with the models of plain rounding, makes the
models of the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.sqf_codec import chunk_rows, contexts_of
from ..runtime.sqf_models import LARGEST, PROBABILITY_BITS
from ..runtime.sqf_rans import Contexts
from .grid import grid_scales, narrow, rounded
from .metric import Metric
from .rounding import cancel_and_round, interference
from .solution import Solution
from .threads import side_by_side
from .trellis import sources, viterbi_block, viterbi_columns

FINE_STEP = 0.62
"""The fine step of a trellis in units of the scalar step c of the same slope dD/dR (and nearly the same D)."""
PRICE = 0.3
"""lambda, in squared fine steps a bit: that slope, measured on Gaussian samples at 1.5 to 4 bits."""
FIRST_STATES = 8
"""States of the first pass, which only makes the models."""
ESCAPE_BITS = 10
"""What the value of an escaped code may cost beside its symbol."""
_COLUMNS = 16  # that are rounded in one call where they do not touch


@dataclass(frozen=True, eq=False)
class Prices:
    """What codes cost, as :func:`viterbi` wants it.

    Attributes:
        rows: int32 (m,), the rows' part of the class.
        cols: int32 (n,), the columns' part.
        rates: float32 (classes, 2, LARGEST + 2), bits by magnitude on each grid; the last is that of an escape.
    """

    rows: NDArray[np.int32]
    cols: NDArray[np.int32]
    rates: NDArray[np.float32]

    @classmethod
    def of(cls, contexts: Contexts) -> Prices:
        """Take the prices from the contexts of a coder: of scalar codes (guessed from), or of a trellis'."""
        table = contexts.table[:, :, 128:].astype(np.float64)  # magnitudes 0 ... LARGEST, then an escape
        bits = PROBABILITY_BITS - np.log2(np.maximum(table, 1.0)) + np.where(table > 0, 0.0, ESCAPE_BITS)
        bits[:, :, LARGEST + 1 :] = PROBABILITY_BITS + ESCAPE_BITS
        if contexts.machine is None:  # points of either grid lie twice as far apart as integers do
            points = 2 * np.arange(LARGEST + 2)[None] - np.array([[0], [1]])
            bits = np.maximum(bits[0][:, np.clip(points, 0, LARGEST + 1)] - 1.0, 0.05).swapaxes(0, 1)
        rates = np.ascontiguousarray(bits.swapaxes(0, 1), dtype=np.float32)
        return cls(contexts.rows, contexts.cols, rates)


def round_along_trellis(
    weight: Tensor,
    steps: Tensor,
    rows: Tensor,
    cholesky: Tensor | None,
    states: int,
) -> Tensor:
    """Return the fine-grid integers u of ``W ~ diag(rows) u diag(steps)``, (m, n), on a path of the machine.

    Args:
        weight: W, (m, n).
        steps: float32 (n,) or (1,), the fine steps, exactly as they will be stored.
        rows: float32 (m,) or (1,), likewise.
        cholesky: lower factor of H, (n, n); None for the identity, where columns do not touch.
        states: of the machine.
    """
    couplings = None if cholesky is None else interference(cholesky, steps)
    height = chunk_rows(*weight.shape)  # rows do not touch, and the machine starts anew here anyway
    scales = rows.expand(len(weight)).split(height)

    def rounded_chunk(chunk: tuple[Tensor, Tensor]) -> Tensor:
        part, scale = chunk
        return chunk_along_trellis(part.float() / (scale.float()[:, None] * steps.float()), couplings, states)

    return torch.cat(side_by_side(rounded_chunk, list(zip(weight.split(height), scales, strict=True))))


def chunk_along_trellis(values: Tensor, couplings: Tensor | None, states: int) -> Tensor:
    """Return fine-grid integers near to ``values`` (m, n) on a path of the machine, (m, n).

    Args:
        values: in fine steps, float32, of one of the codec's chunks of rows.
        couplings: of the columns, see :func:`~.rounding.interference`; None where they do not touch.
        states: of the machine.
    """
    codes, machine = values.round().to(torch.int32).numpy(), 0
    for following in (FIRST_STATES, states):
        prices = Prices.of(contexts_of(codes, trellis=machine))
        codes, machine = along_paths(values, couplings, prices, following), following
    return narrow(torch.from_numpy(codes))


def nearest_paths(values: Tensor, codes: Tensor, states: int, price: float) -> Tensor:
    """Return the fine-grid integers of least ``(v - u)^2 + price * bits`` on paths of the machine, (m, n).

    Args:
        values: v, float32 (m, n), in fine steps. Integers that are on a path are their own nearest at no price.
        codes: integers (m, n) on paths of the machine, whose models say what codes cost.
        states: of the machine.
        price: lambda, in squared fine steps a bit.
    """
    height = chunk_rows(*values.shape)
    parts = []
    for some, known in zip(values.split(height), codes.split(height), strict=True):
        prices = Prices.of(contexts_of(known.to(torch.int32).numpy(), trellis=states))
        parts.append(torch.from_numpy(along_paths(some, None, prices, states, price)))
    return narrow(torch.cat(parts))


def along_paths(
    values: Tensor, couplings: Tensor | None, prices: Prices, states: int, rate_price: float = PRICE
) -> NDArray[np.int32]:
    """Round all columns along their best paths at these prices; int32 (m, n)."""
    model = prices.rows, prices.rates, np.float32(rate_price), sources(states)

    if couplings is not None:

        def block(targets: Tensor, v: Tensor, within: Tensor, start: int) -> tuple[Tensor, Tensor]:
            codes, errors = torch.empty_like(v), torch.empty_like(v)
            cols = prices.cols[start : start + len(v)]
            viterbi_block(targets.numpy(), v.numpy(), within.numpy(), cols, *model, codes.numpy(), errors.numpy())
            return codes, errors

        return cancel_and_round(values, couplings, block).to(torch.int32).numpy()
    columns = values.T.contiguous().numpy()
    codes = np.empty(columns.shape, np.int32)
    parts = [slice(at, at + _COLUMNS) for at in range(0, len(columns), _COLUMNS)]
    side_by_side(lambda some: viterbi_columns(columns[some], prices.cols[some], *model, codes[some]), parts)
    return codes.T


def solve_dependent(weight: Tensor, metric: Metric, step: float, states: int) -> Solution:
    """Round a weight along a trellis at the slope of the noise step c.

    Args:
        weight: float (m, n).
        metric: the distance.
        step: c, in the metric's units.
        states: of the machine.
    """
    scales = grid_scales(metric, FINE_STEP * step)
    lower = None if metric.H is None else metric.cholesky()
    codes = round_along_trellis(weight, scales.step_values(), scales.row_values(), lower, states)
    return rounded(weight, metric, "grid", replace(scales.term(codes), trellis=states))
