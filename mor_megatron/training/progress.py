"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """What a run has done; everything else of its state lies in the engine."""

    iteration: int = 0
    """Iterations completed, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences used by them."""
    skipped_iterations: int = 0
    """Iterations whose step was not applied."""
    nan_iterations: int = 0
    """Iterations whose loss was not finite."""
    skipped_in_a_row: int = 0
    """Unapplied steps since the last applied one."""
