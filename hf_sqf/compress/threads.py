"""One number of threads for all that computes: torch's own (``torch.set_num_threads``, ``OMP_NUM_THREADS``).

Solvers take many small steps. torch's threads would wait for one another at each of them, for longer than a step takes
where something else uses the processors, too; and what is summed by several threads depends on how many they are. So
work is cut into parts that do not touch (weights, rows, columns), whatever the number of threads; as many threads as
torch may use take parts side by side, and torch computes each on one. Kernels that numba compiled start no threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_free: ContextVar[int] = ContextVar("threads that a part may use in turn")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int] = (), room: float = math.inf
) -> list[Result]:
    """Return what ``work`` returned for each item. Parts of one item's work may be side by side in turn.

    Args:
        work: must not depend on what runs beside it.
        items: the parts.
        sizes: of the items.
        room: so many items run at a time that their sizes together stay within it (one may always run).
    """
    free, count = _free.get(torch.get_num_threads()), min(1, len(items))
    largest = sorted(sizes or [0] * len(items), reverse=True)
    while count < min(free, len(items)) and sum(largest[: count + 1]) <= room:
        count += 1
    with one_thread():
        if count <= 1:
            token = _free.set(free)
            try:
                return [work(item) for item in items]
            finally:
                _free.reset(token)
        with ThreadPoolExecutor(count, initializer=_begin, initargs=(free // count,)) as pool:
            results = [pool.submit(work, item) for item in items]
            try:
                return [result.result() for result in results]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what has not begun will not
                raise


def _begin(free: int) -> None:
    """Set up a thread of a pool: torch counts threads for each thread that calls it."""
    torch.set_num_threads(1)
    _free.set(free)
