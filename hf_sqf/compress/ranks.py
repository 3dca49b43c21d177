"""The processes of one run (``torchrun``, ``accelerate launch``), which share its work out and all have its results.

Whoever launches them initialises ``torch.distributed`` as usual; where nobody did, a process is a run of its own and
nothing here communicates. What is shared out and in which order results are put together never depends on the number
of ranks, so that the bytes of a run do not either.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .threads import side_by_side

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
_PATIENCE = timedelta(days=30)  # a rank may be at one weight for long; one that died is noticed at once
_COMING = timedelta(minutes=30)  # for all ranks to come at first
_SILENCE = 60.0  # seconds until it is said that other ranks are waited for


class Ranks:
    """All processes of a run, as one of them sees it.

    Attributes:
        rank: the number of this process.
        size: how many there are; 1 where ``torch.distributed`` is not initialised.
    """

    _here: ClassVar[tuple[object, Ranks] | None] = None

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @classmethod
    def here(cls) -> Ranks:
        """Return the ranks of the process group that is initialised. Every rank of it must come here.

        Raises:
            RuntimeError: another rank did not come within half an hour.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        if cls._here is None or cls._here[0] is not dist.group.WORLD:
            cls._here = dist.group.WORLD, cls(dist.get_rank(), dist.get_world_size(), _group())
        return cls._here[1]

    @classmethod
    def launched(cls) -> Ranks:
        """Return the ranks that a launcher (``torchrun``) started, for programs that do not meet them otherwise."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
        if several and dist.is_available() and not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls.here()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Share work out by cost: return the rank of each piece, the costliest first to whoever has least to do."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[index] = load.index(min(load))
            load[owners[index]] += costs[index]
        return owners

    def share_out(
        self,
        items: Sequence[Item],
        costs: Sequence[int],
        work: Callable[[Item], Result],
        name: Callable[[Item], str],
        room: float = math.inf,
    ) -> list[Result]:
        """Return what ``work`` returned for every item, on all ranks. Each is done by its owner (:meth:`owners`).

        Args:
            items: the same on all ranks.
            costs: of each.
            work: its results should be small, and can be pickled.
            name: of an item, to say where a rank stopped.
            room: what the costs of the items that run at a time on a rank may add up to; see :func:`side_by_side`.

        Raises:
            Exception: that of ``work``, on the rank where it was raised.
            RuntimeError: on all other ranks; says which rank stopped, at which item and why.
        """
        failed: list[str] = []
        mine = [index for index, owner in enumerate(self.owners(costs)) if owner == self.rank]

        def one(index: int) -> Result:
            try:
                return work(items[index])
            except Exception:
                failed.append(name(items[index]))
                raise

        def part() -> dict[int, Result]:
            results = side_by_side(one, mine, [costs[index] for index in mine], room)
            return dict(zip(mine, results, strict=True))

        found = self.gather(part, lambda: failed[0] if failed else "")
        merged = {index: result for results in found for index, result in results.items()}
        return [merged[index] for index in range(len(items))]

    def gather(self, work: Callable[[], Result], at: Callable[[], str] = lambda: "") -> list[Result]:
        """Return what ``work`` returned on each rank; where one raised, all raise, as :meth:`share_out` does.

        Args:
            work: is called once on every rank.
            at: what it was at when it raised.
        """
        if self.size == 1:
            return [work()]
        raised, said, result = None, None, None
        try:
            result = work()
        except Exception as error:
            place = f" at {at()}" if at() else ""
            raised, said = error, f"rank {self.rank} stopped{place}: {type(error).__name__}: {error}"
        found: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(found, (said, result), group=self._group))
        reasons = [reason for reason, _ in found if reason is not None]
        if raised is not None:
            logger.error(said)
            raise raised
        if reasons:
            raise RuntimeError("; ".join(reasons))
        return [value for _, value in found]

    def together(self, work: Callable[[], Result]) -> Result:
        """Return what ``work`` returned here, once all ranks have done theirs; where one raised, all raise."""
        result: list[Result] = []
        self.gather(lambda: result.append(work()))
        return result[0]

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Return, on all ranks, what ``work`` returned on the first; the others do not call it."""
        found = self.gather(lambda: work() if self.first else None)[0]
        return found  # type: ignore[return-value]

    def agree(self, what: str, value: str) -> None:
        """Raise ValueError on all ranks unless all have the same value of ``what``."""
        values = self.gather(lambda: value)
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise ValueError(f"{what}: rank {differing[0]} has another than rank 0; all ranks must ask for the same")

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Return the owner's tensor, on all ranks.

        Args:
            tensor: on the owner, what is sent; elsewhere room for it, of the same shape and data type.
            owner: the rank whose tensor it is.
        """
        if self.size == 1:
            return tensor
        sent = tensor.cpu().contiguous()
        self._exchange(lambda: dist.broadcast(sent, owner, group=self._group))
        return sent.to(tensor.device)

    @staticmethod
    def _exchange(collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # gloo says it in terms of sockets
            raise RuntimeError(f"another rank died, or cannot be reached any more ({error})") from error


def _group() -> dist.ProcessGroup:
    """Return a process group of all ranks that sends from the processors' memory and is patient.

    It takes all ranks to make one. Whether they all come is found out with less patience: a rank that compresses alone
    must not wait for ever.
    """
    said = (
        f"rank {dist.get_rank()} waits for the others: under torch.distributed all {dist.get_world_size()} ranks "
        "must call compress, compress_checkpoint or from_pretrained with an SQFConfig"
    )
    timer = threading.Timer(_SILENCE, logger.warning, (said,))
    timer.daemon = True
    timer.start()
    try:
        trial = dist.new_group(backend="gloo", timeout=_COMING)
    except RuntimeError as error:
        raise RuntimeError(f"{said} ({error})") from error
    finally:
        timer.cancel()
    dist.destroy_process_group(trial)
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def empty_bytes(size: int) -> Tensor:
    """Return room for ``size`` bytes."""
    return torch.empty(size, dtype=torch.uint8)
