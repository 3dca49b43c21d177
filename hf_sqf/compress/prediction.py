"""What a structure will cost, known from the spectrum of the weight alone.

All costs are Lagrangians ``distortion + lambda bits`` in units where the noise step is 1, so that lambda is
``slope(1)``: by them one sees which atoms pay for themselves, and which structures are worth trying.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTRY_COSTS = (0.0625, 0.12487, 0.20594, 0.26884, 0.32509, 0.38091, 0.43707, 0.49397, 0.55131, 0.60885, 0.66651)
"""Least cost of a Gaussian entry of mean square 2^-4, 2^-3, ... 2^6, rounded with step 1 and the best dead zone."""


def entry_cost(energy: Tensor) -> Tensor:
    """Return the cost of rounding a Gaussian entry of mean square ``energy`` with step 1.

    Small entries are all dropped: their cost is their energy. For large ones, the distortion tends to 1/12 and the
    entropy grows by half a bit with each octave of energy.
    """
    table = torch.tensor(ENTRY_COSTS, dtype=torch.float64)
    octave = torch.log2(energy.double().clamp_min(2.0**-4)) + 4.0
    below = octave.floor().clamp(0, len(table) - 2).long()
    cost = table[below] + (octave - below) * (table[below + 1] - table[below])
    return torch.where(energy < 2.0**-4, energy.double(), cost)


def atom_costs(power: Tensor, rows: float, width: int) -> Tensor:
    """Return the cost of storing each atom and its codes, (r,).

    Args:
        power: s^2 of the atoms, (r,): the energy that an atom's outer product has in the weight.
        rows: of the codes, m.
        width: of the atoms, n. They are rounded with steps 1 / s, so that both factors add the same noise.
    """
    return rows * entry_cost(power / rows) + width * entry_cost(power / width)


def atoms_that_pay(power: Tensor, rows: float, width: int) -> int:
    """Return how many atoms lower the cost when what they leave is dropped. ``power`` falls."""
    return int((atom_costs(power, rows, width) < power).sum())


def columns_cost(power: Tensor, rows: float) -> float:
    """Return the cost of columns with squared norms ``power`` (n,) as they are: over the identity."""
    return float((rows * entry_cost(power / rows)).sum())


def low_rank_cost(power: Tensor, rows: float, width: int) -> float:
    """Return the cost of a weight as its best sum of atoms."""
    return float(torch.minimum(atom_costs(power, rows, width), power).sum())


def atoms_before_grid(power: Tensor, rows: float, width: int) -> tuple[int, float]:
    """Return how many atoms to take away before the rest is rounded entry by entry, and the saving (>= 0).

    Args:
        power: s^2 of *all* atoms, falling.
        rows: m.
        width: n.
    """
    rest = (power.sum() - power.cumsum(0)).clamp_min(0.0)
    rest = torch.cat([power.sum()[None], rest])
    spent = torch.cat([power.new_zeros(1), atom_costs(power, rows, width).cumsum(0)])
    cost = spent + rows * width * entry_cost(rest / (rows * width))
    count = int(cost.argmin())
    return count, float(cost[0] - cost[count])
