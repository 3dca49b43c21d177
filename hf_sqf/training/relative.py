"""Steps relative to a parameter's size, for what is trained beside the factors: biases, norms, new heads.

Logarithms of scales are what learning rates of training factors are meant for: a step of 2e-3 changes a scale by 0.2 %.
Adam moves every number by about the learning rate, whatever its size, and a bias of 0.02 would move by a tenth in one
step. So such a parameter P takes the step that the optimizer made times

    min(max(rms(P), 0.01), 1)

as Adafactor's do (Shazeer and Stern, arXiv 1804.04235, section 8): at most the Trainer's rate, and at least a hundredth
of it, since biases of new heads start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modules import PREFIX

_LEAST_SIZE = 0.01


class RelativeSteps:
    """Shortens an optimizer's steps.

    Args:
        module: whose trained parameters take them, but for those of factors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [p for name, p in module.named_parameters() if p.requires_grad and PREFIX not in name]
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self) -> None:
        """Remember where the parameters are, before the optimizer's step."""
        self._before = [(parameter, parameter.detach().clone()) for parameter in self._parameters]

    @torch.no_grad()
    def end(self) -> None:
        """Take back, after the optimizer's step, what it moved them too far. Without :meth:`begin` nothing moved."""
        for parameter, before in self._before:
            size = before.float().square().mean().sqrt().clamp(_LEAST_SIZE, 1.0)
            parameter.copy_(torch.lerp(before, parameter, size.to(parameter.dtype)))
        self._before = []
