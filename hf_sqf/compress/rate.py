"""What integers cost in the file."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.sqf_factors import Factors, Term


def array_bits(values: Tensor) -> float:
    """Empirical entropy of integers within classes of columns of like magnitude, with a small table."""
    if values.numel() == 0:
        return 0.0
    table = (values if values.dim() == 2 else values.reshape(-1, 1)).long()
    klass = torch.round(2.0 * torch.log2(table.double().square().mean(0) + 1e-3)).long()
    klass = torch.unique(klass, return_inverse=True)[1]
    low, high = int(table.min()), int(table.max())
    count = torch.bincount(((table - low) + klass * (high - low + 1)).reshape(-1)).double()
    count = torch.nn.functional.pad(count, (0, -len(count) % (high - low + 1))).reshape(-1, high - low + 1)
    total = count.sum(1, keepdim=True)
    return float(-(count * torch.log2(torch.where(count > 0, count / total, 1.0))).sum()) + 64.0


def term_bits(term: Term) -> float:
    """Return the bits of one term, side information included."""
    return sum(array_bits(a) for a in (term.codes, term.steps, term.rows, term.atoms) if a is not None)


def factors_bits(factors: Factors) -> float:
    """Return the bits of all terms."""
    return sum(term_bits(t) for t in factors.terms)
