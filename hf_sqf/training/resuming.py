"""What a checkpoint needs beyond the model: it lies with the optimizer's state.

A checkpoint's model is an ordinary compressed one, which has no latents. They are part of the state by which training
goes on, and so they go where the Trainer keeps that: into the optimizer's state dict, beside the moments of the same
parameters, under names of their own. The Trainer saves and loads it as ever, on every rank.
"""

from __future__ import annotations

from typing import Any

import torch

from .terms import Memory, TrainedTerm

_MARK = "sqf_"
"""Of our names in the state of a parameter."""


class Keeper:
    """Adds the memory of trained terms to an optimizer's state dict, and takes it from a state that was loaded.

    Args:
        terms: all that are trained.
    """

    def __init__(self, terms: list[TrainedTerm]) -> None:
        self._owner = {p: term for term in terms for p in term.parameters.values()}
        self._hook: Any = None

    def attach(self, optimizer: Any) -> None:  # noqa: ANN401 (accelerate's wrapper or torch's)
        """Take back what a checkpoint's state holds, and add to every state dict from now on.

        Raises:
            TypeError: the optimizer is none of torch's, and would lose the latents.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"expected an optimizer of torch, got {type(inner).__name__}: it cannot keep latents")
        for parameter, owner in self._owner.items():
            state: dict[str, Any] = inner.state.get(parameter, {})
            kept = {name[len(_MARK) :]: state.pop(name) for name in list(state) if name.startswith(_MARK)}
            if kept:
                owner.remember(parameter, kept)
        self.detach()
        self._hook = inner.register_state_dict_post_hook(self._add)

    def detach(self) -> None:
        """Add no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        memory: Memory = {}
        for term in dict.fromkeys(self._owner.values()):
            memory |= term.memory()
        state = dict(state_dict["state"])
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], packed["params"], strict=True):
                if parameter in memory:
                    ours = {_MARK + name: value for name, value in memory[parameter].items()}
                    state[index] = {**state.get(index, {}), **ours}
        return {**state_dict, "state": state}
