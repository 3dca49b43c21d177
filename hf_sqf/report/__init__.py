"""Says what compression did to a model: sizes, fidelity, plots."""
