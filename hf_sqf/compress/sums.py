"""Sums over calibration data that several processes measure, the same bits whatever their number.

Sums of floating-point numbers depend on the order of their terms. So the batches are cut into groups, of which each
has sums of its own, and those are added in the order of the groups, on all ranks alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .blocks import Batch
from .ranks import Ranks
from .recorder import Recorder

GROUPS = 8
"""Groups that batches are cut into, and so the most ranks that measure at a time."""
Item = TypeVar("Item")


def groups(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Cut a sequence into :data:`GROUPS` parts of nearly equal length, in order (fewer where there are fewer items)."""
    count = min(GROUPS, len(items))
    ends = [len(items) * i // max(count, 1) for i in range(count + 1)]
    return [items[start:end] for start, end in zip(ends, ends[1:], strict=False)]


@dataclass(eq=False)
class Sums:
    """What the recorders of all ranks have summed; for the attributes see :class:`~.recorder.Recorder`.

    Attributes:
        rows: rows of predictions of the batches that were not held out.
        held_rows: those of the batches held out.
        held_out: whether batches are held out now, where it stands for a recorder.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)
    held_inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    held_energies: dict[str, Tensor] = field(default_factory=dict)
    held_changes: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    held_rows: int = 0
    held_out: bool = False

    def take(self, recorder: Recorder | Sums, turns: int, ranks: Ranks) -> None:
        """Add the sums of one group from the recorder of each of the first ``turns`` ranks, in the ranks' order.

        Every rank calls it, with its own recorder, which is empty afterwards.
        """
        mine = list(_pieces(recorder))
        said = [(kind, key, tuple(tensor.shape), tensor.device.type) for kind, key, tensor in mine]
        found = ranks.gather(lambda: (said, recorder.counts))
        for owner, (pieces, counts) in enumerate(found[:turns]):
            for key, count in counts.items():
                self.counts[key] = self.counts.get(key, 0) + count
            for place, (kind, key, shape, device) in enumerate(pieces):
                tensor = mine[place][2] if owner == ranks.rank else torch.empty(shape, device=device)
                self._add(kind, key, ranks.broadcast(tensor, owner))
        recorder.moments, recorder.counts, recorder.energies = {}, {}, {}
        recorder.held_inputs, recorder.held_energies, recorder.held_changes = {}, {}, {}

    def _add(self, kind: str, key: str, tensor: Tensor) -> None:
        if kind == "held_inputs":
            self.held_inputs.setdefault(key, []).append(tensor)
            return
        sums = getattr(self, kind)
        if key in sums:
            sums[key].add_(tensor)
        else:
            sums[key] = tensor


def measure_all(
    recorder: Recorder | Sums,
    ranks: Ranks,
    data: tuple[Sequence[Batch], Sequence[Batch]],
    run: Callable[[int, Batch], int],
    done: Callable[[int], object],
) -> Sums:
    """Run batches, group by group, each group on one rank; return the sums of all.

    Args:
        recorder: records what runs, or is what ``run`` adds to; is empty before and afterwards.
        ranks: the processes that share the work.
        data: batches that are measured, and batches that are held out.
        run: runs a batch: (number of the batch among all, batch) -> rows of predictions. A batch of one number runs on
            the same rank each time.
        done: is told how many batches have been run.
    """
    sums, numbers = Sums(), itertools.count()
    for recorder.held_out, batches in zip((False, True), data, strict=True):
        parts = groups([(next(numbers), batch) for batch in batches])
        for first in range(0, len(parts), ranks.size):
            turns = parts[first : first + ranks.size]
            mine = turns[ranks.rank] if ranks.rank < len(turns) else []

            def run_mine(mine: Sequence[tuple[int, Batch]] = mine) -> int:
                count = 0
                for number, batch in mine:
                    count += run(number, batch)
                    done(1)
                return count

            rows = sum(ranks.gather(run_mine))
            if recorder.held_out:
                sums.held_rows += rows
            else:
                sums.rows += rows
            done(sum(map(len, turns)) - len(mine))
            sums.take(recorder, len(turns), ranks)
    return sums


def _pieces(recorder: Recorder | Sums) -> Iterator[tuple[str, str, Tensor]]:
    """Iterate over what a recorder holds: (attribute, name of the weight or input, float32 tensor)."""
    for kind in ("moments", "energies", "held_energies", "held_changes"):
        for key, tensor in getattr(recorder, kind).items():
            yield kind, key, tensor
    for key, rows in recorder.held_inputs.items():
        yield "held_inputs", key, torch.cat(rows)
