"""Products of inputs with a matrix of factors.

One function for each kind of module. The matrix is decoded in float32, rounded to the input's dtype, and multiplied;
the output's dtype is the input's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sqf_factors import Factors


def linear(x: Tensor, factors: Factors, bias: Tensor | None = None) -> Tensor:
    """Return ``x . W^T + bias``: x (..., n) to (..., m), for factors of shape (m, n)."""
    return F.linear(x, factors.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def lookup(ids: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor:
    """Return the rows ``ids`` (integers of any shape) of W as (..., n); no other row is decoded."""
    rows = factors.dense(dtype, rows=ids.reshape(-1))
    return rows.reshape(*ids.shape, factors.shape[1])
