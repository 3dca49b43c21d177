"""Products with integer codes that pass their gradients straight through to what the codes were projected from.

The forward uses the projected codes Z, held in 8 bits where they fit; the backward hands ``dL/dZ`` to the latent that
Z = P(latent) came from (Bengio, Leonard and Courville, arXiv 1308.3432). Nothing dense is kept between the two: codes
are widened again when their turn comes.

A latent of None stands for codes that stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.sqf_factors import log_scale

_LN_2 = 0.6931471805599453


class LogScale(torch.autograd.Function):
    """Natural log-scales to scales on the file's grid: ``2^(round(l r / ln 2) / r)``, with gradient ``ds/dl = s``."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, resolution: int) -> Tensor:  # noqa: ANN401 (torch's own, not public)
        """Return float32 scales of the shape of ``logs``."""
        scales = log_scale(nearest_exponents(logs, resolution), resolution)
        ctx.save_for_backward(scales)
        return scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Pass ``s dL/ds``."""
        (scales,) = ctx.saved_tensors
        return grad * scales, None


def nearest_exponents(logs: Tensor, resolution: int) -> Tensor:
    """Return the int32 exponents of natural log-scales on a grid of ``resolution`` divisions of an octave."""
    return torch.round(logs.detach().double() * (resolution / _LN_2)).to(torch.int32)


def logs_of(exponents: Tensor, resolution: int) -> Tensor:
    """Return the natural log-scales, float32, of exponents: what :func:`nearest_exponents` maps back to them."""
    return (exponents.double() * (_LN_2 / resolution)).float()


class Integers(torch.autograd.Function):
    """Integers as floats."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor | None, codes: Tensor, unit: float) -> Tensor:  # noqa: ANN401
        """Return the codes in float32; ``latent`` has their shape and counts in units of ``unit``."""
        ctx.unit = unit
        return codes.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        """Pass the gradient on."""
        return (grad * ctx.unit if ctx.needs_input_grad[0] else None), None, None


class Product(torch.autograd.Function):
    """``x Z^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor | None, codes: Tensor, unit: float) -> Tensor:  # noqa: ANN401
        """(..., n) times integers (m, n) to (..., m), in the dtype of x."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, codes)
        ctx.unit = unit
        return torch.nn.functional.linear(x, codes.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        """Pass ``g Z`` to x and ``g^T x`` to the latent."""
        x, codes = ctx.saved_tensors
        to_x = grad @ codes.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_latent = None
        if ctx.needs_input_grad[1]:
            to_latent = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float() * ctx.unit
        return to_x, to_latent, None, None


class Rows(torch.autograd.Function):
    """``Z[ids]``."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor | None, ids: Tensor, codes: Tensor, unit: float) -> Tensor:  # noqa: ANN401
        """Integers (k,) and codes (m, n) to float32 (k, n)."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.unit = codes.shape, unit
        return codes[ids].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # noqa: ANN401
        """Add the gradients up by row."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (ids,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_add_(0, ids, grad * ctx.unit), None, None, None


class Matrix(torch.autograd.Function):
    """``diag(rows) Z diag(steps)``."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        latent: Tensor | None,
        rows: Tensor,
        steps: Tensor,
        codes: Tensor,
        unit: float,
    ) -> Tensor:
        """Codes (m, n), rows (m,) or (1,), steps (n,) or (1,) to float32 (m, n)."""
        ctx.save_for_backward(rows, steps, codes)
        ctx.unit = unit
        return codes.float() * steps * rows[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:  # noqa: ANN401
        """Pass on the gradients of all three factors."""
        rows, steps, codes = ctx.saved_tensors
        weighted = grad * codes
        by_row = (weighted * steps).sum(1)
        by_step = (weighted * rows[:, None]).sum(0)
        to_latent = grad * rows[:, None] * steps * ctx.unit if ctx.needs_input_grad[0] else None
        return to_latent, _like(by_row, rows), _like(by_step, steps), None, None


class OneHot(torch.autograd.Function):
    """``Z D`` for one-hot Z: the atoms that blocks were assigned to, ``D[indices]``."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor | None, atoms: Tensor, indices: Tensor, unit: float) -> Tensor:  # noqa: ANN401
        """Atoms (K, d) and indices (m',) to (m', d); ``latent``, (m', d), is what was assigned."""
        ctx.save_for_backward(indices)
        ctx.shape, ctx.unit = atoms.shape, unit
        return atoms[indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # noqa: ANN401
        """Pass the gradient to the blocks, and its sums to their atoms."""
        (indices,) = ctx.saved_tensors
        to_atoms = grad.new_zeros(ctx.shape).index_add_(0, indices, grad)
        return (grad * ctx.unit if ctx.needs_input_grad[0] else None), to_atoms, None, None


def _like(sums: Tensor, scales: Tensor) -> Tensor:
    return sums if scales.numel() == sums.numel() else sums.sum().reshape(scales.shape)
