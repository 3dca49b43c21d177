"""Entropy-constrained rounding: which integer an entry is worth, given what integers cost.

Rounding a target t (in noise steps) to z costs ``(t - z)^2 + lambda b(|z|)`` at the slope ``lambda = 2 ln 2 / 12``,
where b are the bits of the code. The best z changes from k to k + 1 at

    |t|  =  k + 1/2 + lambda (b(k+1) - b(k)) / 2

(Chou, Lookabaugh and Gray, 1989; Sullivan, 1996): small codes fall into a dead zone, and all cells move outwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .solution import slope

_SAMPLE = 1 << 18
_ROUNDS = 4
_SEEN = 32  # codes of a magnitude that make its frequency worth believing
_LEVELS = 256


def prices_of(targets: Tensor) -> Tensor:
    """Return ``lambda (b(k+1) - b(k))`` for k = 0, 1, ..., float64, never falling, at most 1.

    Args:
        targets: in noise steps, any shape. Frequencies are those of their codes, which depend on the prices in turn.
    """
    flat = targets.reshape(-1)
    size = flat[:: math.ceil(flat.numel() / _SAMPLE)].abs().double()
    steps = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        count = torch.bincount(round_at_price(size, steps).clamp(max=_LEVELS).long(), minlength=2).double()
        count[1:] /= 2.0  # plus and minus
        known = max(2, int((count >= _SEEN).int().cumprod(0).sum()))
        bits = -torch.log2((count[:known] + 0.5) / size.numel())
        steps = (slope(1.0) * bits.diff()).clamp(0.0, 1.0).cummax(0).values
    return steps


def round_at_price(targets: Tensor, prices: Tensor) -> Tensor:
    """Return the integers of least ``(t - z)^2 + price``; beyond the last price, each further step costs as much.

    Args:
        targets: any shape.
        prices: what the step from magnitude k to k + 1 costs, never falling, at most 1: so that the best integer is
            the nearest or the next one towards zero.
    """
    size = targets.abs()
    nearest = size.round()
    half = 0.5 * torch.cat([prices.new_zeros(1), prices]).to(size.dtype)[nearest.clamp(max=len(prices)).long()]
    return (nearest - (size - nearest + 0.5 < half).to(size.dtype)) * targets.sign()


def price_of_codes(codes: Tensor, prices: Tensor) -> float:
    """Return ``lambda b`` summed over codes, but for what zeros cost."""
    size = codes.abs().double()
    table = torch.cat([prices.new_zeros(1), prices.cumsum(0)])
    last = len(prices)
    return float((table[size.clamp(max=last).long()] + (size - last).clamp_min(0.0) * prices[-1]).sum())
