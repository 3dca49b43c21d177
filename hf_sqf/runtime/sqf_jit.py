"""Compilation with numba where it is installed; everything works, more slowly, where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["HAVE_NUMBA", "carray", "cfunc", "jit", "types"]

try:
    import numba
    from numba import carray, cfunc, types
except ImportError:
    HAVE_NUMBA = False
    carray = cfunc = types = None  # type: ignore[assignment]  # what uses them is not called then
else:
    HAVE_NUMBA = True


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function``: cached on disk, releasing the GIL, without fused or reordered float arithmetic.

    Without numba the function is left as it is, and its callers take their numpy path.
    """
    if not HAVE_NUMBA:
        return function
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep a cache in
        compiled = numba.njit(nogil=True)(function)
    return compiled
