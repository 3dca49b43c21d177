"""Makes Factors from weights: metric, projections, solvers, starts, budget."""
