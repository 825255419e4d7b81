"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """What a run has done; everything else of its state lies in the engine."""

    iteration: int = 0
    """Iterations completed, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences used by them, or left out: where in the data the next iteration begins."""
    skipped_iterations: int = 0
    """Iterations whose step was not applied."""
    nan_iterations: int = 0
    """Iterations whose loss was not finite."""
    skipped_in_a_row: int = 0
    """Unapplied steps since the last applied one."""
    loss_average: float | None = None
    """Moving average of the loss of applied iterations, nats."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint because of a loss spike."""
    left_out_samples: int = 0
    """Training sequences that it then left out, a part of `consumed_samples`."""

    @property
    def trained_samples(self) -> int:
        """Training sequences used, whatever was left out: what schedules in samples count."""
        return self.consumed_samples - self.left_out_samples
