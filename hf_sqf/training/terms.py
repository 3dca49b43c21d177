"""Terms of factors whose scales, codes and dictionaries are parameters.

A trained term keeps its :class:`~hf_sqf.runtime.sqf_factors.Term`, always in its sets, and beside it the parameters
that the optimizer moves; :meth:`TrainedTerm.project` brings the term after them:

========  ===========================  ==================================================================
what      parameter                    in the forward
========  ===========================  ==================================================================
steps     natural logarithms, (K,)     on a logarithmic scale of ``resolution`` divisions of an octave
rows      natural logarithms, (m',)    likewise
codes     latents / unit, like Z;      the projected codes
          (m', d) where Z is one-hot
atoms     latents / unit, (K, d)       the nearest integers
========  ===========================  ==================================================================

The ``unit`` is how far a latent goes while the logarithm of a scale goes 1: with one learning rate for all, as the
Trainer has it, an optimizer such as Adam moves codes by ``unit`` times as much as logarithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.sqf_factors import Term
from .latents import nearest_latents
from .projecting import Limits, coded_bits, foremost
from .straight_through import Integers, LogScale, Matrix, OneHot, Product, Rows, logs_of, nearest_exponents

_SPREAD_BITS = 4.0
"""Bits of a scale that training made differ from its neighbours, about: a few percent, in 1/32 octaves."""
_SPREAD_SHARE = 0.004
"""Most of a weight's bits that scales may take that were one before."""

_SHARE = 0.002
"""Most of the codes that a step may change where not all may."""
_CODED = ("codes", "atoms")
"""Parameters that are latents."""

Memory = dict[nn.Parameter, dict[str, Any]]
"""What a checkpoint of the model lacks to go on from: parameter -> name -> tensor, or numbers."""


@dataclass(frozen=True)
class Options:
    """How factors are trained.

    Attributes:
        codes: train codes, too; else scales and dictionaries alone.
        hard: the parameters themselves are projected, and what that takes from them is added again at the next step.
        resolution: least divisions of an octave in trained scales.
        code_rate: how far codes go while the logarithm of a scale goes 1: in steps of the grid; where blocks are
            assigned to atoms, and for atoms, in units of their root mean square.
        every: optimizer steps from one projection of codes on a trellis to the next.
        share: most of the codes that may change in one optimizer step, of those on a trellis at their own; None for
            what suits a term.
    """

    codes: bool
    hard: bool
    resolution: int
    code_rate: float
    every: int
    share: float | None


class TrainedTerm:
    """One term with its parameters.

    Attributes:
        term: the term as it is now, but for its scales, which :meth:`current` adds.
        parameters: name -> parameter.
        changed: codes that projections have changed so far.

    Args:
        term: to train.
        structure: of the weight.
        options: how.
        wanted: what the term is to stand for, float32 (m', d), which is where latents of codes start; without, and
            where the codes are not the nearest to it, they start at the codes.
    """

    def __init__(self, term: Term, structure: str, options: Options, wanted: Tensor | None = None) -> None:
        self.options, self.structure = options, structure
        self.changed = 0
        self._coded: tuple[Tensor, Tensor | None, float] | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self._units: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}  # what projections in place took
        # Steps of atoms that are summed are powers of two, so that sums are exact: they stay as they are.
        self._free_steps = term.atoms is None or term.one_hot
        self._spread = _affordable(term)
        self.term = self._finer(term)
        self.scale = float(term.scale_value())
        self.limits = Limits.of(term, structure)
        near = nearest_latents(self.term, wanted) if wanted is not None and options.codes else None
        # On a trellis, where a change takes others along, all at once did harm wherever it was tried.
        all_at_once = near is not None and not term.trellis
        self._share = options.share or (1.0 if all_at_once else _SHARE)
        values = self._values(self.term)
        latents = dict(values)
        if near is not None:
            latents["codes"], strength = near
            if "atoms" in latents:  # where they are at this strength, in the middle of their cells
                latents["atoms"] = latents["atoms"] + 0.5 * strength * latents["atoms"].sign()
            self.limits.strength = strength
        for name, value in values.items():
            self._units[name] = torch.tensor(options.code_rate * _spacing(name, term, value) if name in _CODED else 1.0)
            self.parameters[name] = nn.Parameter((value if options.hard else latents[name]) / self._units[name])
            if options.hard and name in _CODED:
                self._left[name] = latents[name] - value

    def _finer(self, term: Term) -> Term:
        def finer(scale: Tensor, resolution: int) -> tuple[Tensor, int]:
            factor = math.ceil(self.options.resolution / resolution)
            return scale * factor, resolution * factor

        rows, by_row = finer(term.rows, term.row_resolution)
        steps, by_step = term.steps, term.step_resolution
        if self._free_steps:
            steps, by_step = finer(steps, by_step)
        if "rows" in self._spread:
            rows = rows.expand(term.codes.shape[0]).clone()
        if "steps" in self._spread:
            steps = steps.expand(term.atom_count).clone()
        return replace(term, rows=rows, row_resolution=by_row, steps=steps, step_resolution=by_step)

    def _values(self, term: Term) -> dict[str, Tensor]:
        """Return what the parameters are to be for a term, in float32 and natural units."""
        values = {"rows": logs_of(term.rows, term.row_resolution)}
        if self._free_steps:
            values["steps"] = logs_of(term.steps, term.step_resolution)
        if self.options.codes:
            values["codes"] = term.dictionary().float()[term.codes.long()] if term.one_hot else term.codes.float()
        if term.atoms is not None:
            values["atoms"] = term.atoms.float()
        return values

    def read(self, term: Term) -> None:
        """Take over a term of the same form, in place of all that the parameters hold, unless it is the same.

        Raises:
            ValueError: it has another form.
        """
        finer = self._finer(term)
        if _form(finer) != _form(self.term):
            raise ValueError("the factors have another form than those that are trained")
        if _same(finer, self.current()):
            return  # so that the latents go on from where they are
        self.term, self.scale = finer.to(self.term.codes.device), float(term.scale_value())
        with torch.no_grad():
            for name, value in self._values(self.term).items():
                self.parameters[name].copy_(value / self._units[name])
        for left in self._left.values():
            left.zero_()

    # ------------------------------------------------------------------------------------------ forward

    def steps(self) -> Tensor:
        """Float32 (K,) or (1,), the scale folded in, with gradients."""
        if not self._free_steps:
            return self.term.step_values()
        return LogScale.apply(self.parameters["steps"], self.term.step_resolution) * self.scale

    def rows(self) -> Tensor:
        """Float32 (m',) or (1,), with gradients."""
        scales: Tensor = LogScale.apply(self.parameters["rows"], self.term.row_resolution)
        return scales

    @property
    def is_grid(self) -> bool:
        """Whether the dictionary is the identity."""
        return self.term.atoms is None

    def _unit(self, name: str) -> float:
        return float(self._units.get(name, 1.0))

    def matrix(self) -> Tensor:
        """The term as float32 (m', d), with gradients."""
        latent = self.parameters.get("codes")
        if self.is_grid:
            whole: Tensor = Matrix.apply(latent, self.rows(), self.steps(), self.term.codes, self._unit("codes"))
            return whole
        if self.term.one_hot:
            unit = self._unit("codes") * self.scale
            blocks: Tensor = OneHot.apply(latent, self._dictionary(), self.term.codes.long(), unit)
        else:
            blocks = Integers.apply(latent, self.term.codes, self._unit("codes")) @ self._dictionary()
        return blocks * self.rows()[:, None]

    def _dictionary(self) -> Tensor:
        """Atoms times their steps, float32 (K, d), with gradients."""
        assert self.term.atoms is not None
        atoms: Tensor = Integers.apply(self.parameters.get("atoms"), self.term.atoms, self._unit("atoms"))
        return atoms * self.steps().expand(self.term.atom_count)[:, None]

    def product(self, x: Tensor) -> Tensor:
        """Return ``x W^T`` of a grid, (..., n) to (..., m), in the dtype of x."""
        scaled = x * self.steps().to(x.dtype)
        y = Product.apply(scaled, self.parameters.get("codes"), self.term.codes, self._unit("codes"))
        return y * self.rows().to(x.dtype)

    def pick(self, ids: Tensor) -> Tensor:
        """Return the rows ``ids`` (k,) of a term without one-hot codes, float32 (k, d)."""
        codes = Rows.apply(self.parameters.get("codes"), ids, self.term.codes, self._unit("codes"))
        rows = self.rows()
        picked = codes * self.steps() if self.is_grid else codes @ self._dictionary()
        return picked * (rows if rows.numel() == 1 else rows[ids][:, None])

    # ------------------------------------------------------------------------------------------ after a step

    @torch.no_grad()
    def project(self, step: int) -> None:
        """Bring the term after its parameters: once after each optimizer step, of which ``step`` is the number."""
        moved = {}
        for name in _CODED:
            if name in self.parameters:
                moved[name] = self.parameters[name] * self._units[name]
                if self.options.hard:
                    moved[name] += self._left[name]
        if moved.keys() == {"atoms"}:
            self.term = self.limits.with_dictionary(self.term, moved["atoms"])
            value = self._values(self.term)["atoms"]  # where that is as far as it may go, latents wait at its edge
            moved["atoms"] = moved["atoms"].clamp(value - 0.5, value + 0.5)
            self.parameters["atoms"].copy_(moved["atoms"] / self._units["atoms"])
        elif moved and (not self.term.trellis or step % self.options.every == 0):
            before, steps = self.term, self.options.every if self.term.trellis else 1
            latent = foremost(moved["codes"], self._values(before)["codes"], steps * self._share)
            self.term = self.limits.project(self._with_scales(), latent, moved.get("atoms"))
            self.changed += int((before.codes != self.term.codes).sum())
        if self.options.hard:
            for name, value in self._values(self.term).items():
                if name in moved:
                    self._left[name] = moved[name] - value
                    self.parameters[name].copy_(value / self._units[name])

    def _with_scales(self) -> Term:
        rows = nearest_exponents(self.parameters["rows"], self.term.row_resolution)
        if not self._free_steps:
            return replace(self.term, rows=rows)
        return replace(
            self.term, rows=rows, steps=nearest_exponents(self.parameters["steps"], self.term.step_resolution)
        )

    def current(self) -> Term:
        """Return the term as it would be saved now."""
        return self._with_scales()

    def coded_bits(self) -> float:
        """Return the bits of codes and dictionary as they are now; computed anew only where they changed."""
        if self._coded is None or self._coded[0] is not self.term.codes or self._coded[1] is not self.term.atoms:
            self._coded = self.term.codes, self.term.atoms, coded_bits(self.term)
        return self._coded[2]

    # ------------------------------------------------------------------------------------------ checkpoints

    def memory(self) -> Memory:
        """Return what the term does not tell of its parameters."""
        found: Memory = {}
        coded = [name for name in _CODED if name in self.parameters]
        for name, parameter in self.parameters.items():
            found[parameter] = {"value": parameter.detach(), "unit": self._units[name]}
            if name in self._left:
                found[parameter]["left"] = self._left[name]
            if name in coded[:1]:
                # Numbers, not tensors: an optimizer that loads its state casts tensors to the parameter's dtype.
                found[parameter]["limits"] = {k: v for k, v in vars(self.limits).items() if k != "support"}
        return found

    @torch.no_grad()
    def remember(self, parameter: nn.Parameter, kept: dict[str, Any]) -> None:
        """Take back what :meth:`memory` gave for a parameter."""
        name = next(n for n, p in self.parameters.items() if p is parameter)
        parameter.copy_(kept["value"])
        self._units[name] = kept["unit"].cpu().reshape(())
        if "left" in kept:
            self._left[name] = kept["left"].to(parameter.device)
        if "limits" in kept:
            self.limits = replace(self.limits, **kept["limits"])

    def to(self, device: torch.device) -> None:
        """Move all that is no parameter."""
        self.term = self.term.to(device)
        self._left = {name: left.to(device) for name, left in self._left.items()}


def _spacing(name: str, term: Term, value: Tensor) -> float:
    """Return how far a latent has to go for something to change, about."""
    if name == "codes" and not term.one_hot:
        return 2.0 if term.trellis else 1.0  # a state's points lie two fine steps apart
    power = float(value.double().square().mean().sqrt())
    return max(power, 1e-3 if name == "codes" else 1.0)


def _form(term: Term) -> tuple[object, ...]:
    return term.codes.shape, term.steps.shape, term.rows.shape, term.atom_count, term.width, term.trellis


def _same(one: Term, other: Term) -> bool:
    pairs = [(one.codes, other.codes), (one.steps, other.steps), (one.rows, other.rows), (one.atoms, other.atoms)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _affordable(term: Term) -> set[str]:
    """Return which scales that are one for all may become one for each row and each step of a grid.

    Where weights were rounded without data, all have the same scale, and training would find little to train.
    """
    if term.atoms is not None:
        return set()
    left, found = _SPREAD_SHARE * coded_bits(term), set()
    for name, scale, count in (("rows", term.rows, term.codes.shape[0]), ("steps", term.steps, term.atom_count)):
        if scale.numel() == 1 and count > 1 and _SPREAD_BITS * count <= left:
            left -= _SPREAD_BITS * count
            found.add(name)
    return found
