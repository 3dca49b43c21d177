"""Gives memory back to the system: freed memory, and pages of files that were read and will not be soon again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import numpy as np
from torch import Tensor, nn

_ALIGNED = 64
"""Bytes: where torch itself begins a tensor."""
_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
_FILE_PAGE = np.uint64(1 << 61)
_SWAPPED = np.uint64(1 << 62)
_PRESENT = np.uint64(1 << 63)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def trim() -> None:
    """Hand what was freed back to the system, where the C library (glibc) would rather keep it."""
    if sys.platform.startswith("linux") and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def release(tensor: Tensor) -> None:
    """Drop the pages of a tensor that is mapped from a file; they are read again when they are needed again.

    Safetensors files are mapped, so that every weight that was ever read would stay in memory. Tensors that lie in
    ordinary memory, or were changed since they were mapped, are left alone; so are all where the system (other than
    Linux) does not say which is which.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    storage = tensor.untyped_storage()
    first = -(-tensor.data_ptr() // page)  # whole pages of this tensor only
    last = (
        min(tensor.data_ptr() + tensor.numel() * tensor.element_size(), storage.data_ptr() + storage.nbytes()) // page
    )
    if last <= first:
        return
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * (last - first)), dtype=np.uint64)
    except OSError:
        return  # a system that keeps this to itself
    changed = (entries & _SWAPPED) | ((entries & _PRESENT) & ~((entries & _FILE_PAGE) << np.uint64(2)))
    if len(entries) == last - first and not changed.any():
        _libc().madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page), ctypes.c_int(_DONTNEED))


def align(model: nn.Module) -> None:
    """Have every floating-point tensor in memory begin where torch begins its own, in place.

    Safetensors files are mapped, and a tensor in them begins anywhere. Sums of some products of BLAS depend on that in
    their last bits, so that a model would give other outputs after saving than before.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % _ALIGNED:
            mapped = tensor.detach()
            tensor.data = mapped.clone()
            release(mapped)
