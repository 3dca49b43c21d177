"""Gives memory back to the system while a model is compressed weight by weight."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Event, Thread

import numpy as np
from torch import Tensor, nn

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


def release_module(module: nn.Module) -> None:
    """Give back what running a module took: pages of its weights, where they are mapped, and what was freed."""
    for p in module.parameters():
        release(p)
    trim()


@contextmanager
def releasing(tensors: Sequence[Tensor], seconds: float = 0.2) -> Iterator[None]:
    """Release tensors again and again meanwhile: for what reads each of them once, as writing a file of them does."""
    done = Event()

    def run() -> None:
        while not done.wait(seconds):
            for tensor in tensors:
                release(tensor)

    thread = Thread(target=run, name="releasing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for tensor in tensors:
            release(tensor)


class Turns:
    """Has blocks take turns: the mapped pages of a block's weights are given back as soon as another one runs."""

    def __init__(self) -> None:
        self._last: nn.Module | None = None

    def take(self, block: nn.Module) -> None:
        """Say that a block is about to run."""
        if self._last is not None and self._last is not block:
            for p in self._last.parameters():
                release(p)
        self._last = block
