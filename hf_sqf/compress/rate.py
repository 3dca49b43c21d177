"""What factors cost in the file: the entropy coder's ideal lengths, with all side information."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..runtime.sqf_codec import ideal_bits
from ..runtime.sqf_factors import Factors, Term

HEADER = 256.0
"""Bits of a term's headers, lengths and lanes."""
_TABLE_ENTRY = 4.0  # bits of an index's probability


def term_bits(term: Term) -> float:
    """Return the bits of one term."""
    if term.one_hot:
        codes = index_bits(torch.bincount(term.codes.long(), minlength=term.atom_count))
    else:
        codes = ideal_bits(_array(term.codes), trellis=term.trellis)
    return HEADER + codes + ideal_bits(_array(term.rows[None])) + atom_bits(term)


def atom_bits(term: Term) -> float:
    """Return the bits of a term's dictionary with its steps."""
    atoms = 0.0 if term.atoms is None else ideal_bits(_array(term.atoms))
    return atoms + ideal_bits(_array(term.steps[None]))


def factors_bits(factors: Factors) -> float:
    """Return the bits of all terms."""
    return sum(term_bits(term) for term in factors.terms)


def index_bits(usage: Tensor) -> float:
    """Return the bits of one-hot codes whose atoms are used ``usage`` times, (K,): coded flat, or with a table."""
    count = usage.double()
    total = float(count.sum())
    entropy = float((count * torch.log2(total / count.clamp_min(1.0))).sum())
    return min(total * math.log2(len(usage)), entropy + _TABLE_ENTRY * len(usage))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
