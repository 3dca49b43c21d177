"""Compilation with numba where it is installed; everything works, more slowly, where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:  # an optional accelerator: each caller has a numpy path
    numba = None

HAVE_NUMBA: bool = numba is not None
"""Whether compiled kernels are at hand."""

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile ``function`` (cached on disk, releasing the GIL, without fused or reordered float arithmetic)."""
    return function if numba is None else numba.njit(cache=True, nogil=True, fastmath=False)(function)
