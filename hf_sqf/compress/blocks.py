"""Runs a model block by block, with all the data through one block before the next one is needed.

What a block gives to the next waits in files. So the memory of what is measured is that of one block, however many
there are, and a block may be changed before the data reaches the next one.

The model's own ``forward`` is run each time, since only it knows the masks and positions that go with the data; blocks
before the one that is wanted are passed over, and the last of them returns what it gave when its turn was.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Batch = Mapping[str, Tensor]
Stack = tuple[nn.Module, ...]
"""Blocks of which each one's output is the next one's input, nothing between them."""


class Reached(Exception):  # noqa: N818 (no error: the data is where it should be)
    """Ends a forward pass behind the block that was wanted."""


class Replay:
    """Runs batches through one block after another.

    Args:
        model: in evaluation mode, giving the same output each time.
        stacks: its blocks, as :func:`find_stacks` found them. Without any, the model is run as a whole.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        self._model = model
        self.blocks = [block for stack in stacks for block in stack]
        self._ends = set(itertools.accumulate(len(stack) for stack in stacks))
        self._folder = tempfile.TemporaryDirectory(prefix="sqf-blocks-")

    def _file(self, index: int, key: str | int) -> Path:
        return Path(self._folder.name) / f"{index}.{key}.safetensors"

    def output(self, index: int, key: str | int) -> Tensor:
        """Return what block ``index`` gave for a batch; kept until the second block after it had its turn."""
        return _read(self._file(index, key))

    @contextmanager
    def at(self, index: int) -> Iterator[Callable[[str | int, Batch], Any]]:
        """Yield a function that runs batches through block ``index``: (a name for the batch, batch) -> None.

        Every batch must have been through the blocks before. Its output is kept for the next block, under its name.
        With the number of blocks for ``index``, what comes behind them is run, and the model's output returned.
        """
        current: str | int = 0  # the batch

        def kept(position: int) -> Path:
            return self._file(position, current)

        def run(key: str | int, batch: Batch) -> Any:  # noqa: ANN401
            nonlocal current
            current = key
            with torch.no_grad():
                try:
                    return self._model(**batch)
                except Reached:
                    return None

        with ExitStack() as undo:
            for position, block in enumerate(self.blocks[: index + 1]):
                own = block.__dict__.get("forward")  # set where hooks of other libraries wrap it
                undo.callback(partial(setattr, block, "forward", own) if own else partial(delattr, block, "forward"))
                if position == index:
                    block.forward = partial(_stop, block.forward, partial(kept, position))
                elif position == index - 1 or position + 1 in self._ends:
                    block.forward = partial(_recall, partial(kept, position))
                else:
                    block.forward = _given
            yield run
        if index >= 2 and index - 1 not in self._ends:
            for file in Path(self._folder.name).glob(f"{index - 2}.*"):
                file.unlink()


def _given(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Return the hidden states among the arguments of a block."""
    return args[0] if args else kwargs.get("hidden_states")


def _recall(kept: Callable[[], Path], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    return _read(kept()).to(_given(*args, **kwargs).device)


def _read(file: Path) -> Tensor:
    return load_file(file)["states"]


def _stop(forward: Callable[..., Tensor], kept: Callable[[], Path], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    save_file({"states": forward(*args, **kwargs).detach().contiguous()}, kept())
    raise Reached


def find_stacks(model: nn.Module, batch: Batch) -> list[Stack]:
    """Return the stacks of a model's blocks in the order in which they run; none where it cannot be replayed.

    Blocks are the outermost modules that transformers recomputes one by one under gradient checkpointing. Each must
    run exactly once, and give hidden states and nothing else. Whether a replay gives the very output of the model is
    tried on the batch: states that are read elsewhere, as pyramids of features do, would be wrong.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    names = {name for name, _ in found}
    outermost = [m for name, m in found if not any(name.startswith(f"{other}.") for other in names)]
    calls: list[tuple[nn.Module, Any, Tensor | None]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        calls.append((module, _given(*args, **kwargs), output if isinstance(output, Tensor) else None))

    with ExitStack() as hooks, torch.no_grad():
        for module in outermost:
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        expected = model(**batch)
    if len({id(module) for module, _, _ in calls}) != len(calls) or any(output is None for _, _, output in calls):
        return []
    stacks: list[list[nn.Module]] = []
    before: Tensor | None = None
    for block, given, output in calls:
        if given is not before or before is None:
            stacks.append([])
        stacks[-1].append(block)
        before = output
    found_stacks = [tuple(stack) for stack in stacks]
    return found_stacks if _replays(model, found_stacks, batch, expected) else []


def _replays(model: nn.Module, stacks: Sequence[Stack], batch: Batch, expected: Any) -> bool:  # noqa: ANN401
    """Whether block by block the batch gives the output that was expected, to the bit."""
    replay, output = Replay(model, stacks), None
    for index in range(len(replay.blocks) + 1):
        with replay.at(index) as run:
            output = run(0, batch)
    if output is None:
        return False
    pairs = [(output[key], value) for key, value in expected.items() if isinstance(value, Tensor)]
    return bool(pairs) and all(torch.equal(one, other) for one, other in pairs)
