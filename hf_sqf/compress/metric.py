"""The distance in which a weight is approximated.

    d(W, W^) = tr(G (W - W^) H (W - W^)^T),    G = diag(g^2)

H (n x n) is the second moment of the layer's inputs, g^2 that of the loss gradient at its outputs. Both are
the identity without data; with labels drawn from the model itself this is the Kronecker-factored Fisher
(Martens and Grosse, arXiv 1503.05671), its value is in nats, and distances of different layers add up.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..runtime.sqf_factors import Factors

logger = logging.getLogger(__name__)

DAMPING = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What is added to H's diagonal, relative to its mean; the first that leaves every pivot above FLOOR is taken."""
FLOOR = 1e-7
"""Least squared pivot L_jj^2 of the Cholesky factor, relative to the mean of H's diagonal."""
_CHUNK = 1 << 20  # entries of a weight that are widened to float64 at a time


@dataclass(frozen=True, eq=False)
class Metric:
    """The pair (H, g) of the distance ``tr(G (W - W^) H (W - W^)^T)``.

    Attributes:
        H: symmetric positive semidefinite (n, n); None for the identity.
        g: positive weights of the rows, (m,) or (1,) where all are equal; None for ones.
    """

    H: Tensor | None = None
    g: Tensor | None = None

    @classmethod
    def relative(cls, *weights: Tensor) -> Metric:
        """Return the metric without data: squared error relative to a weight's own energy per parameter.

        ``weights`` are its matrices, which share the metric. Since ``g = 1 / rms(W)``, distances and noise steps of
        different weights compare, and one step can govern a whole model. A weight of zeros has g = 1.
        """
        energy = sum(Metric().distance(weight, None) for weight in weights)
        rms = math.sqrt(energy / max(sum(weight.numel() for weight in weights), 1))
        return cls(g=torch.tensor([1.0 / rms if rms > 0.0 else 1.0], dtype=torch.float64))

    @property
    def uniform(self) -> bool:
        """Every entry of the weight counts the same: H is the identity and g constant."""
        return self.H is None and (self.g is None or self.g.numel() == 1)

    def row_weights(self) -> Tensor:
        """Return g in float64, (m,) or (1,)."""
        return torch.ones(1, dtype=torch.float64) if self.g is None else self.g.double().reshape(-1)

    def of_rows(self, select: slice) -> Metric:
        """Return the metric of some of a weight's rows alone."""
        return Metric(self.H, self.g if self.g is None or self.g.numel() == 1 else self.g[select])

    def distance(self, weight: Tensor, approx: Tensor | Factors | None) -> float:
        """Return ``d(weight, approx)``, summed in float64; ``approx=None`` stands for zero. Both (m, n).

        Factors are multiplied some rows at a time, so that the approximation takes no memory.
        """
        g, H = self.row_weights(), None if self.H is None else self.H.double()
        rows = max(1, _CHUNK // max(weight.shape[1], 1))
        total = 0.0
        for at in range(0, weight.shape[0], rows):
            error = weight[at : at + rows].double()
            if isinstance(approx, Factors):
                some = torch.arange(at, at + len(error), device=approx.device)
                error = error - approx.dense(rows=some).double()
            elif approx is not None:
                error = error - approx[at : at + rows].double()
            error = error * (g if g.numel() == 1 else g[at : at + rows])[:, None]
            total += float((error * error if H is None else (error @ H) * error).sum())
        return total

    def cholesky(self) -> Tensor:
        """Return the lower factor L (n, n), float64, of ``H = L L^T`` (damped where H is singular; logged).

        Raises:
            ValueError: H is not finite, or not positive semidefinite.
        """
        if self.H is None:
            raise ValueError("the identity metric has no Cholesky factor to compute")
        return self._lower

    @cached_property
    def _lower(self) -> Tensor:
        assert self.H is not None
        H = self.H.double()
        mean = float(H.diagonal().mean())
        if not torch.isfinite(H).all() or mean < 0.0:
            raise ValueError("metric H must be finite and positive semidefinite")
        mean = mean or 1.0  # H = 0: an unused layer; any factor will do
        identity = torch.eye(H.shape[0], dtype=torch.float64, device=H.device)
        for damping in DAMPING:
            lower, failed = torch.linalg.cholesky_ex(H + damping * mean * identity)
            if not failed and float(lower.diagonal().min()) ** 2 >= FLOOR * mean:
                if damping:
                    logger.warning("metric H is singular: added %.0e of its mean diagonal %.3g", damping, mean)
                return lower
        raise ValueError("metric H must be positive semidefinite")

    def in_dictionary(self, dictionary: Tensor) -> Metric:
        """Return the metric of codes Z over the dictionary D (K, n): ``d(Z D, Z' D)`` has ``D H D^T`` for H."""
        D = dictionary.double()
        return Metric(D @ D.T if self.H is None else D @ self.H.double() @ D.T, self.g)

    def of_blocks(self, width: int, count: int) -> Metric:
        """Return the metric of a weight cut into ``count`` blocks of ``width`` columns a row.

        A block sees the mean of H's diagonal blocks; what H says across blocks is left out. Every block of
        a row has the row's g.
        """
        g = self.g if self.g is None or self.g.numel() == 1 else self.g.repeat_interleave(count)
        if self.H is None or count == 1:
            return Metric(self.H, g)
        padded = torch.zeros(count * width, count * width, dtype=torch.float64, device=self.H.device)
        padded[: self.H.shape[0], : self.H.shape[0]] = self.H
        blocks = padded.reshape(count, width, count, width).diagonal(dim1=0, dim2=2)
        return Metric(blocks.mean(-1), g)
