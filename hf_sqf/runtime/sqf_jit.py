"""Compilation with numba where it is installed; everything works, more slowly, where it is not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

HAVE_NUMBA: bool = find_spec("numba") is not None
"""Whether compiled kernels are at hand."""


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function``: cached on disk, releasing the GIL, without fused or reordered float arithmetic.

    Without numba the function is left as it is, and its callers take their numpy path.
    """
    if not HAVE_NUMBA:
        return function
    import numba

    compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, fastmath=False)(function)
    return compiled
