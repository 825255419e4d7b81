"""Fits to isoFLOP results (approach 2 of Hoffmann et al., arXiv 2203.15556)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parabola:
    """loss = minimum + curvature (ln N - ln optimum)^2, with curvature above 0."""

    optimum: float
    """Number of parameters with the lowest loss."""
    minimum: float
    """The lowest loss, nats per token."""
    curvature: float
    inside: bool
    """Whether the optimum lies between the trained sizes; otherwise it is an extrapolation."""

    def __call__(self, parameters: float) -> float:
        """Loss of a model with this number of parameters."""
        return self.minimum + self.curvature * math.log(parameters / self.optimum) ** 2


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: float
    exponent: float


def fit_parabola(parameters: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """Least squares in ln N at one budget; None with fewer than three sizes, or if the parabola opens downwards."""
    if len(set(parameters)) < 3:
        return None
    x = np.log(parameters)
    centre = x.mean()  # the powers of ln N alone are nearly collinear
    curvature, slope, constant = np.polyfit(x - centre, losses, 2)
    if curvature <= 0:
        return None
    shift = -slope / (2 * curvature)
    inside = bool(x.min() <= centre + shift <= x.max())
    optimum = math.exp(min(700.0, centre + shift))
    return Parabola(optimum, float(constant + slope * shift / 2), float(curvature), inside)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Least squares in the logarithms; None with fewer than three points: a line through two proves nothing."""
    if len(x) < 3:
        return None
    exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(math.exp(constant), float(exponent))
