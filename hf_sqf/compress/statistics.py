"""Calibration statistics: what data says about how much each weight's errors matter.

From a few thousand tokens, :func:`~.collect.collect` measures ``H = E[x x^T]`` and ``g^2 = E[delta^2]`` of every
weight (what x and delta are: :mod:`.recorder`), and :meth:`Statistics.metrics` hands out the metric
``d = tr(G (W - W^) H (W - W^)^T)``. With labels drawn from the model itself, half of it is the expected KL divergence
in nats per prediction that an error causes: distances of different weights add up, and one noise step governs a model.

A few thousand tokens of one kind of text teach the metric that text. Both factors are therefore shrunk towards
multiples of the identity,

    H <- (1 - a) H + a mean(diag H) I,        g^2 <- (1 - b) g^2 + b mean(g^2),

with a and b chosen on data that was held out. Rounding with steps c / L_jj makes errors of covariance
``c^2/12 (L L^T)^-1`` and costs ``1/2 log2 det(L L^T) - n log2 c`` bits a row, up to a constant. So, at equal bits, the
distortion on held-out inputs X is proportional to

    det(H)^(1/n) tr(H^-1 X^T X):

the Gaussian likelihood of held-out data, up to scale, chooses what compresses best.

The metric takes the rows of data that an input consists of for unrelated, and both factors for independent. Neither is
so: under the mean over tokens that sentence encoders end in, errors add up. With the gradient of the loss of held-out
data, ``D = sum_t delta_t x_t^T`` over an input's rows, the same likelihood chooses the scale of the product, too:

    s = E tr(G^-1 D H^-1 D^T) / (m n)

multiplies g^2. It is the change of the loss, squared, relative to d, for errors of the covariance above; the trace is
taken over some of them, drawn at random.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..runtime.sqf_memory import release
from .metric import Metric
from .targets import Target

SHRINKAGES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates for a and b."""
_TYPICAL_ROWS = 32  # of each weight, to find the typical one by
_ERRORS = 32  # that a trace is taken over
FORMAT = "sqf-statistics-1"


class FileMoments(Mapping[str, Tensor]):
    """Moments in safetensors files, read one at a time: all of them may need more memory than there is.

    Args:
        paths: of files to read. Those that :meth:`add` writes live as long as this object.
    """

    def __init__(self, paths: Sequence[str | Path] = ()) -> None:
        self._of: dict[str, Any] = {}  # key -> open file
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0
        for path in paths:
            self._open(path)

    def _open(self, path: str | Path) -> None:
        file = safe_open(path, "pt")
        self._of |= {key[2:]: file for key in file.keys() if key.startswith("H:")}  # noqa: SIM118

    def add(self, moments: Mapping[str, Tensor]) -> None:
        """Move moments to a file; they take the place of others under the same names."""
        if not moments:
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="sqf-")
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        self._written += 1
        save_file({f"H:{key}": H.contiguous() for key, H in moments.items()}, path)
        self._open(path)

    def keep(self, keys: Collection[str]) -> None:
        """Forget all but these."""
        self._of = {key: file for key, file in self._of.items() if key in keys}

    def __deepcopy__(self, memo: dict[int, Any]) -> FileMoments:
        return self  # open files cannot be copied, and do not change

    def __getitem__(self, key: str) -> Tensor:
        mapped = self._of[key].get_tensor(f"H:{key}")
        H = mapped.clone()
        release(mapped)  # pages that were ever read would stay in memory otherwise
        return H

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a model's inputs and gradients.

    Attributes:
        moments: input's name -> H, float32 (n, n).
        energies: weight's name -> g^2, float32 (m,); a slice of experts is named ``name.0``, ``name.1``, ...
        inputs: weight's name -> name of its input in ``moments``.
        shrinkage: input's name -> a; weight's name and ``:g`` -> b.
        typical: median over the weights of ``d(W, 0)`` per parameter, in nats: the unit of :meth:`metrics`.
        tokens: rows of predictions that were measured.
        fingerprint: of the model that was measured.
        notes: weight's name -> what was missing in its statistics, and what stands in for it.
        scales: weight's name -> s; 1 where nothing is said.
    """

    moments: Mapping[str, Tensor]
    energies: dict[str, Tensor]
    inputs: dict[str, str]
    shrinkage: dict[str, float]
    typical: float
    tokens: int
    fingerprint: str
    notes: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def metrics(self, name: str, matrices: Sequence[Tensor]) -> list[Metric]:
        """Return the metric of each matrix (m, n) of a weight, in units of ``typical``.

        So a typical entry has the root mean square 1 in its metric, as it has without data; and weights that the data
        says nothing of get the importance of a typical one.

        Raises:
            ValueError: the weight was not measured, or has another shape.
        """
        known = name in self.energies or name in self.notes
        names = [name] if known else [f"{name}.{i}" for i in range(len(matrices))]
        return [self._metric(part, matrix) for part, matrix in zip(names, matrices, strict=True)]

    def _metric(self, name: str, matrix: Tensor) -> Metric:
        if name in self.notes:
            return Metric.relative(matrix)
        if name not in self.energies:
            raise ValueError(f"statistics: {name} was not measured")
        energy, key = self.energies[name], self.inputs[name]
        H = self.moments.get(key)
        if (len(energy), len(H) if H is not None else matrix.shape[1]) != tuple(matrix.shape):
            raise ValueError(f"statistics: {name} was measured with another shape than {tuple(matrix.shape)}")
        unit = self.typical / self.scales.get(name, 1.0)
        g = (shrink_diagonal(energy, self.shrinkage[f"{name}:g"]) / unit).sqrt()
        return Metric(None if H is None else shrink(H, self.shrinkage[key]), g)

    def summary(self) -> dict[str, Any]:
        """Return what is written into a compressed model's config."""
        return {
            "predictions": self.tokens,
            "weights": len(self.energies),
            "without_data": dict(sorted(self.notes.items())),
        }

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        tensors = {f"H:{k}": v for k, v in self.moments.items()} | {f"g:{k}": v for k, v in self.energies.items()}
        about = {"inputs": self.inputs, "shrinkage": self.shrinkage, "typical": self.typical, "tokens": self.tokens,
                 "fingerprint": self.fingerprint, "notes": self.notes, "scales": self.scales}  # fmt: skip
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is of another kind.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} does not hold calibration statistics in the format {FORMAT}")
            energies = {k[2:]: file.get_tensor(k) for k in file.keys() if k.startswith("g:")}  # noqa: SIM118
        return cls(FileMoments([path]), energies, **json.loads(metadata["about"]))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless these are the statistics of this model."""
        if self.fingerprint != fingerprint(model):
            raise ValueError("statistics: they were collected on another model")


def shrink(H: Tensor, share: float) -> Tensor:
    """Return ``(1 - a) H + a mean(diag H) I``."""
    shrunk = (1.0 - share) * H
    shrunk.diagonal().add_(share * H.diagonal().mean())
    return shrunk


def shrink_diagonal(energy: Tensor, share: float) -> Tensor:
    """Return ``(1 - b) g^2 + b mean(g^2)``."""
    return (1.0 - share) * energy + share * energy.mean()


def choose_shrinkage(H: Tensor, held: Tensor) -> float:
    """Return the a that minimises ``log det H / n + log tr(H^-1 X^T X)`` on held-out rows X (k, n)."""

    def cost(share: float) -> float:
        lower, failed = torch.linalg.cholesky_ex(shrink(H, share))
        if failed:
            return float("inf")
        white = torch.linalg.solve_triangular(lower, held.T, upper=False)
        return float(2.0 * lower.diagonal().log().mean() + white.square().mean().log())

    return min(SHRINKAGES, key=cost)


def choose_diagonal_shrinkage(energy: Tensor, held: Tensor) -> float:
    """Return the b that minimises ``mean log g^2 + log mean(v / g^2)`` on held-out energies v (m,)."""

    def cost(share: float) -> float:
        shrunk = shrink_diagonal(energy, share)
        return float(shrunk.log().mean() + (held / shrunk).mean().log())

    return min(SHRINKAGES, key=cost)


def random_errors(H: Tensor, share: float) -> Tensor:
    """Return errors of a row as rounding makes them, of covariance ``H^-1 / n``: float32 (n, k), the same each time."""
    lower = Metric(shrink(H, share)).cholesky()
    draw = torch.randn(len(H), _ERRORS, generator=torch.Generator().manual_seed(0), dtype=lower.dtype).to(lower.device)
    return (torch.linalg.solve_triangular(lower.mT, draw, upper=True) / len(H) ** 0.5).float()


def choose_scale(energy: Tensor, changes: Tensor) -> float:
    """Return s for a weight with g^2 (m,): the mean of ``v / g^2``, v (m,) being what errors of its rows really change.

    It is 1 where no held-out data reached the weight.
    """
    return float((changes / energy).mean()) or 1.0


def typical_importance(measured: Statistics, targets: Iterable[Target]) -> float:
    """Return the median of ``d(W, 0)`` per parameter over the weights that were measured."""
    found = []
    for target in targets:
        matrices = target.matrices()
        names = [f"{target.name}.{i}" for i in range(len(matrices))] if target.held.stacked else [target.name]
        for name, matrix in zip(names, matrices, strict=True):
            if name in measured.energies:
                rows = torch.linspace(0, len(matrix) - 1, min(len(matrix), _TYPICAL_ROWS)).round().long()
                metric = measured.metrics(name, [matrix])[0]
                some = Metric(metric.H, metric.row_weights()[rows])
                found.append(some.distance(matrix[rows], None) / matrix[rows].numel())
        release(target.parameter)
    return statistics.median(found) if found else 1.0


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes and some values of a model's parameters."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().reshape(-1)[:: max(1, p.numel() // 16)].float().cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode() + some.numpy().tobytes())
        release(p)  # systems map far more about a page than was read
    return digest.hexdigest()
