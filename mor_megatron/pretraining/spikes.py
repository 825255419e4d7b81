"""Loss spikes: an iteration whose loss is far above those before it.

The loss is compared with its exponential moving average, which is part of the run's progress, so that a resumed run
notices the same spikes. Early on the loss falls, and the average lies above it: no spike is seen where there is none.
The loop decides what to do about one: log it, or go back to the last checkpoint and leave out the samples since (as
PaLM was trained, arXiv:2204.02311, sec. 5.1).
"""

from __future__ import annotations

from mor_megatron.training.progress import Progress

DECAY = 0.95
"""Of the moving average: it remembers about 20 iterations."""
WARMUP = 20
"""Applied iterations before the average is trusted."""


def is_spike(loss: float, progress: Progress, factor: float | None) -> bool:
    """Whether `loss` (nats, finite) exceeds `factor` times the average of the iterations before; None: never."""
    if factor is None or progress.loss_average is None:
        return False
    return progress.iteration - progress.skipped_iterations >= WARMUP and loss > factor * progress.loss_average


def update_average(loss: float, progress: Progress) -> None:
    """Take an applied iteration's loss into the average."""
    average = loss if progress.loss_average is None else progress.loss_average
    progress.loss_average = DECAY * average + (1.0 - DECAY) * loss
