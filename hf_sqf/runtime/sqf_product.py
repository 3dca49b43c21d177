"""Products of inputs with compressed weights, as operators of torch.

Each takes a weight as the one uint8 tensor that a module holds, so that programs that ``torch.compile`` and
``torch.export`` make treat it as the parameter it is; what it takes to run is found or made at the call
(:mod:`sqf_backends`). The weight itself is frozen: gradients reach inputs and biases.

In plain inference, modules skip the operators (:func:`plain`): at batch 1 a dispatch costs as much as a product.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from .sqf_backends import matrices_in
from .sqf_running import Running

NAMESPACE = "sqf" if __name__ == "hf_sqf.runtime.sqf_product" else f"sqf_{zlib.crc32(__name__.encode()):08x}"
"""Of the operators. A copy that came with a model has its own: torch drops an operator when another takes its name."""


def product(matrix: Running, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x . W^T + bias``, (..., n) to (..., m), outside of autograd.

    Raises:
        ValueError: x is not of n columns, or on another device than W.
    """
    m, n = matrix.shape
    if x.shape[-1] != n:
        raise ValueError(f"the last dimension of the input is {x.shape[-1]}, the weight expects {n}")
    _check_device(x, matrix)
    if not x.is_contiguous():
        x = x.contiguous()
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], m))
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    return matrix.multiply(x, bias)


def picked(matrix: Running, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows ``ids`` (integers of any shape) of W as (..., n); no other is decoded.

    Raises:
        IndexError: an index is out of range.
        ValueError: ids and W are on different devices.
    """
    _check_device(ids, matrix)
    return matrix.pick(ids.reshape(-1).long(), dtype).view(*ids.shape, matrix.shape[1])


def _check_device(x: Tensor, matrix: Running) -> None:
    if x.device != matrix.device:
        raise ValueError(f"the input is on {x.device}, the weight on {matrix.device}: they must be on one device")


# Found once: looking them up takes longer than the calls, between products that leave the caches to nothing else.
_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
autocasting = torch._C._is_any_autocast_enabled


def plain(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product with ``x`` is nobody's business but ours: no gradient, compilation, tracing, or subclass."""
    return not (
        _compiling()
        or type(x) is not Tensor
        or (_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _dispatch_modes()
        or _tracing()
        or _transforms() is not None
    )


def under_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast, where it is on for x's device, takes to products."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(x: Tensor, data: Tensor, bias: Tensor | None, m: int, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    """Return ``x . W^T + bias``: x (..., n) to (..., m), in the dtype of x.

    Args:
        x: floating-point.
        data: the weight, packed or resident.
        bias: (m,) or None.
        m: rows of W.
        n: columns of W.
        runtime: see :mod:`sqf_backends`.
        dtype: of the dense weight that the runtime ``dense`` keeps.
    """
    return product(matrices_in(data, runtime, dtype)[0], x, bias)


@linear.register_fake
def _(x: Tensor, data: Tensor, bias: Tensor | None, m: int, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], m))


@torch.library.custom_op(f"{NAMESPACE}::linear_transposed", mutates_args=())
def linear_transposed(y: Tensor, data: Tensor, m: int, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    """Return ``y . W``: y (..., m) to (..., n), the gradient of :func:`linear` with respect to its input."""
    flat = y.reshape(-1, m)
    return matrices_in(data, runtime, dtype)[0].multiply_transposed(flat).view(*y.shape[:-1], n)


@linear_transposed.register_fake
def _(y: Tensor, data: Tensor, m: int, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    return y.new_empty((*y.shape[:-1], n))


def _linear_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 (torch's own, not public)
    x, data, bias, *ctx.rest = inputs
    ctx.save_for_backward(data)
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    (data,) = ctx.saved_tensors
    inner = linear_transposed(grad, data, *ctx.rest) if ctx.needs_input_grad[0] else None
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return inner, None, bias, None, None, None, None


def _transposed_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
    _, data, *ctx.rest = inputs
    ctx.save_for_backward(data)


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    (data,) = ctx.saved_tensors
    return linear(grad, data, None, *ctx.rest), None, None, None, None, None


linear.register_autograd(_linear_backward, setup_context=_linear_context)
linear_transposed.register_autograd(_transposed_backward, setup_context=_transposed_context)


@torch.library.custom_op(f"{NAMESPACE}::rows", mutates_args=())
def rows(ids: Tensor, data: Tensor, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    """Return the rows ``ids`` (integers of any shape) of W as (..., n): see :func:`picked`."""
    return picked(matrices_in(data, runtime, dtype)[0], ids, dtype)


@rows.register_fake
def _(ids: Tensor, data: Tensor, n: int, runtime: str, dtype: torch.dtype) -> Tensor:
    return data.new_empty((*ids.shape, n), dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::matrix", mutates_args=())
def matrix(data: Tensor, index: int, m: int, n: int, runtime: str, dtype: torch.dtype, keep: torch.dtype) -> Tensor:
    """Return the dense matrix with a given index, of a stack of experts for one, as (m, n).

    Args:
        data: the weight.
        index: of the matrix.
        m: rows.
        n: columns.
        runtime: see :mod:`sqf_backends`.
        dtype: of the result.
        keep: of the dense weight that the runtime ``dense`` keeps.
    """
    found = matrices_in(data, runtime, keep)[index].decode(0, m, dtype)
    return found.clone() if runtime == "dense" else found  # an operator's output must be its own


@matrix.register_fake
def _(data: Tensor, index: int, m: int, n: int, runtime: str, dtype: torch.dtype, keep: torch.dtype) -> Tensor:
    return data.new_empty((m, n), dtype=dtype)
