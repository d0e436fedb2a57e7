"""Several runs seen together: over-optimisation, comparisons, blame, algorithms and optima."""
