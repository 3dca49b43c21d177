"""When weights take the form in which they run: all of a model's when it is told to, or when the first of them runs.

Decoding takes longer than mapping a file, and not every program that loads a model runs it. So a model that has just
been loaded holds the bytes of its file, checked; its modules wait, together, for the first of them to run, and are then
decoded side by side, as many as torch has threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .sqf_backends import keeps_bytes
from .sqf_memory import release, trim


class Holder(Protocol):
    """What a compressed module is here; see :class:`~.sqf_modules.SQFModule`."""

    held: dict[str, Any]
    runtime: str
    waiting: bool

    def _bytes(self, name: str) -> nn.Parameter: ...

    def keep(self, runtime: str) -> None:
        """Keep the bytes that a runtime needs."""


_deciding = threading.RLock()
_waiting_together: WeakKeyDictionary[Any, WeakSet[Any]] = WeakKeyDictionary()
"""A module that waits -> all that wait with it. A copy of a module is not among them, and waits for itself."""


def keep_all(modules: Sequence[tuple[Holder, str]]) -> None:
    """Have modules run as each is asked to: change the bytes that they keep.

    Args:
        modules: with the runtime of each.

    Raises:
        ValueError: the bytes of a weight are damaged; names the tensor.
    """
    alone: list[tuple[Holder, str]] = []
    tied: list[tuple[Holder, str]] = []  # to one of the others, whose bytes are theirs as well
    seen: set[Tensor] = set()
    for module, runtime in modules:
        parameters = {module._bytes(name) for name in module.held}
        (tied if parameters & seen else alone).append((module, runtime))
        seen |= parameters
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # this thread might be in inference mode, those are not
        list(pool.map(lambda one: one[0].keep(one[1]), alone))
        for module, runtime in tied:
            pool.submit(module.keep, runtime).result()
    trim()


def keep_later(modules: Iterable[Holder], runtime: str) -> None:
    """Have modules run in a way, and keep the bytes that it needs when the first of them runs.

    Those that keep their bytes as they are, or whose bytes are offloaded, have nothing to wait for.
    """
    group: WeakSet[Any] = WeakSet()
    now = []
    for module in modules:
        data = [module._bytes(name) for name in module.held]
        if any(d.is_meta or keeps_bytes(d, runtime) for d in data):
            now.append((module, runtime))
            continue
        for d in data:
            release(d.detach())  # what was read to check it
        module.runtime, module.waiting = runtime, True
        group.add(module)
        _waiting_together[module] = group
    keep_all(now)


def take_form(module: Holder) -> None:
    """Have a module that waits, and all that wait with it, wait no longer. Threads may call this at the same time.

    Raises:
        ValueError: as for :func:`keep_all`.
    """
    with _deciding:
        if module.waiting:
            group = {module, *_waiting_together.get(module, ())}
            keep_all([(one, one.runtime) for one in group if one.waiting])


@torch.compiler.assume_constant_result
def take_form_for_program(module: Holder) -> bool:
    """Do what :func:`take_form` does, while a program of the model is made: torch calls it then, not when that runs."""
    take_form(module)
    return True
