"""Fine-tuning of the factors themselves, in the Trainer.

What there is to be trained, and what must hold after every step::

    W^ = sum_t  diag(rows) Z diag(steps) D        Z, D: integers in their sets, Z at no more bits than it had

Parameters of the optimizer are logarithms of the scales, and floats ("latents") that the dictionary and, unless
training is *light*, the codes are projected from, ``Z = P(latent)``. The forward uses the projected factors, scales on
the grid of the file included, so that what is trained is what is saved; gradients go straight through the projections.
This is the projected gradient method of the solvers, ``Z <- P_Z(Z - eta dL/dZ)`` (Kuzmin et al., arXiv 2207.11048),
with the loss of the whole model in place of the weight's distance, and an optimizer's step in place of eta.

=================  ============================================================================================
``terms``          :class:`~.terms.TrainedTerm`: a term in its sets, with the parameters beside it
``factors``        :class:`~.factors.TrainedWeight`: the terms of a weight
``latents``        where latents start
``straight_through``  products with codes whose gradients reach the latents, with nothing dense kept in between
``projecting``     the projections, and the limit of the rate
``modules``        compressed modules that multiply with trained weights, and look in a state dict as ever
``resuming``       the latents in a checkpoint: with the optimizer's state
``callback``       ``SQFCallback``: the Trainer's events
``distillation``   ``distillation_loss``: the original as the teacher
``blockwise``      each block fitted to the original's, before training from end to end
``adapters``       LoRA on top of compressed weights, which must not be merged into them
=================  ============================================================================================

*Where latents start.* With the ``original`` they start at its weights, as near as the codes allow (:mod:`.latents`): a
code that was nearly another one soon is, and training goes much further than from the codes themselves, where each has
to travel half a step first. Codes that calibration chose are not those nearest to the original, and start where they
are.

*The rate.* Codes that move lose what made them cheap: zeros first. So every projection is held to the bits that codes
and dictionary had at the start: where the nearest codes cost more, cheaper ones are made nearer, until they fit; where
none fit, the step changes no code. Scales cost a little more where they become finer than the solver's.

*How many.* Latents of scalar codes that start at the original are all projected in every step, as is usual where
weights are trained for quantization. Those that start at the codes reach the edges of their cells together, since Adam
moves all at about the same speed, whatever their gradients say; and codes that change in the same step by the thousand
undo one another's good. So where they start at the codes, and on a trellis, only those are projected that have gone
furthest, a small share of all in a step.

*Codes on a trellis* (dependent quantization) are projected by Viterbi's algorithm every few steps, and stay what they
were in between while their latents gather gradients. So they are on a path of the machine after every step, and what is
trained meanwhile (scales, norms) is trained for them. The alternative, free integers on the fine grid and one pass of
Viterbi's algorithm at the end, was not chosen: where free codes cost more, the last pass undoes what training did, with
no step left to make up for it (``recipes/projections.py`` compares them).

*Light* training of a ``grid`` needs no gradient of a whole weight: with y = ((x . steps) Z^T) . rows, a step's
gradient is a sum over tokens of x dL/dx, and a row's one of y dL/dy. It takes two products a layer instead of three.
"""
