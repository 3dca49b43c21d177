"""Gives memory back to the system while a model is compressed weight by weight."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from functools import cache

import numpy as np
import torch
from torch import Tensor

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


def on_disk(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that lies in a temporary file: the system may keep it there and not in memory.

    The file has no name any more, and goes when the tensor does. Where files that are open cannot be deleted (other
    than POSIX systems), and for tensors on accelerators, it is an ordinary copy.

    Raises:
        OSError: the disk that temporary files are on is full.
    """
    size = tensor.numel() * tensor.element_size()
    if os.name != "posix" or tensor.device.type != "cpu" or size == 0:
        return tensor.clone()
    with tempfile.NamedTemporaryFile(prefix="sqf-") as file:
        if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, and no signal when pages are written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    release(copy)
    return copy
