"""Scaling laws of the loss: one module for each family, and one way to fit them all to points.

A law is a NamedTuple of its constants; a fit returns what a paper's constants are written as, so both are used alike. `predict`
gives the loss at points, `fitting` resamples and extrapolates any of them.
"""

from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points, points, read_held_out, read_points
from lfm_jax.scaling.fitting import Law, huber_objective, interval, relative_errors, resampled

__all__ = [
    "FLOPS_PER_PARAMETER_AND_TOKEN", "Law", "Points", "huber_objective", "interval", "points", "read_held_out", "read_points",
    "relative_errors", "resampled",
]  # fmt: skip
