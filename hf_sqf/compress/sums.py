"""Sums over calibration data that several processes measure, the same bits whatever their number.

Sums of floating-point numbers depend on the order of their terms. So the batches are cut into groups, of which each
has sums of its own, and those are added in the order of the groups, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .mapped import on_disk, release
from .ranks import Ranks
from .recorder import Recorder

GROUPS = 8
"""Groups that batches are cut into, and so the most ranks that measure at a time."""
Item = TypeVar("Item")


def groups(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Cut a sequence into :data:`GROUPS` parts of nearly equal length, in order (fewer where there are fewer items)."""
    count = min(GROUPS, len(items))
    ends = [len(items) * i // count for i in range(count + 1)]
    return [items[start:end] for start, end in zip(ends, ends[1:], strict=False)]


class Sums:
    """What recorders of all ranks have summed, group by group.

    The moments lie in temporary files, so that memory need hold those of one group only.

    Attributes:
        ranks: the processes that measure.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._counts: dict[str, int] = {}
        self._sums: dict[str, dict[str, Tensor]] = {"moments": {}, "energies": {}, "held_energies": {}}
        self._held_inputs: dict[str, list[Tensor]] = {}

    def take(self, recorder: Recorder, turns: int) -> None:
        """Add the sums of one group from the recorder of each of the first ``turns`` ranks, in the ranks' order.

        Every rank calls it, with its own recorder, which is empty afterwards.
        """
        mine = list(_pieces(recorder))
        said = [(kind, key, tuple(tensor.shape), tensor.device.type) for kind, key, tensor in mine]
        found = self.ranks.gather(lambda: (said, recorder.counts))
        for owner, (pieces, counts) in enumerate(found[:turns]):
            for key, count in counts.items():
                self._counts[key] = self._counts.get(key, 0) + count
            for place, (kind, key, shape, device) in enumerate(pieces):
                tensor = mine[place][2] if owner == self.ranks.rank else torch.empty(shape, device=device)
                self._add(kind, key, self.ranks.broadcast(tensor, owner))
        recorder.moments, recorder.counts, recorder.energies = {}, {}, {}
        recorder.held_inputs, recorder.held_energies = {}, {}

    def give_back(self, recorder: Recorder) -> None:
        """Give a recorder the sums over all groups."""
        recorder.moments, recorder.counts, recorder.energies = (
            self._sums["moments"],
            self._counts,
            self._sums["energies"],
        )
        recorder.held_inputs, recorder.held_energies = self._held_inputs, self._sums["held_energies"]

    def _add(self, kind: str, key: str, tensor: Tensor) -> None:
        if kind == "held_inputs":
            self._held_inputs.setdefault(key, []).append(tensor)
        elif key not in self._sums[kind]:
            self._sums[kind][key] = on_disk(tensor) if kind == "moments" else tensor
        else:
            release(self._sums[kind][key].add_(tensor))


def _pieces(recorder: Recorder) -> Iterator[tuple[str, str, Tensor]]:
    """Iterate over what a recorder holds: (attribute, name of the weight or input, float32 tensor)."""
    for kind in ("moments", "energies", "held_energies"):
        for key, tensor in getattr(recorder, kind).items():
            yield kind, key, tensor
    for key, rows in recorder.held_inputs.items():
        yield "held_inputs", key, torch.cat(rows)
