"""Gives memory back to the system while a model is compressed weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread

from torch import Tensor, nn

from ..runtime.sqf_memory import release, trim


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
