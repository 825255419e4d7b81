"""The learning rate as a pure function of how many iterations are done.

Off by one, as in Megatron-LM and Hugging Face: the rate of iteration i (counted from 1) is that of i-1 completed
iterations. With warm-up the first iteration therefore has rate 0, and a decay to 0 at T never quite gets there: the
last iteration still has 1/decay of the peak. A skipped step counts as an iteration.
"""

from __future__ import annotations

import math

from mor_megatron.config.schema import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, completed: int) -> float:
    """Learning rate of the iteration that follows `completed` finished ones.

    Warm-up is linear from 0. Then constant; or linear or cosine from `lr` to `min_lr` at `lr_decay_iters`; or WSD,
    which holds `lr` until `lr_wsd_decay_iters` before that and falls linearly or as 1 - sqrt (MoR paper's recipe: WSD,
    linear to 0 over the last fifth).

    Args:
        optimizer: the schedule's settings, validated: `lr_decay_iters` and `lr_wsd_decay_iters` are set.
        completed: finished iterations, >= 0.
    """
    assert completed >= 0
    peak, warmup = optimizer.lr, optimizer.lr_warmup_iters
    if completed < warmup:
        return peak * completed / warmup
    if optimizer.lr_decay_style == "constant":
        return peak
    end = optimizer.lr_decay_iters
    if completed >= end:
        return optimizer.min_lr
    if optimizer.lr_decay_style == "WSD":
        length = optimizer.lr_wsd_decay_iters
        start = end - length
        if completed <= start:
            return peak
    else:
        start, length = warmup, end - warmup
    progress = (completed - start) / length
    return optimizer.min_lr + (peak - optimizer.min_lr) * _remaining(optimizer, progress)


def _remaining(optimizer: OptimizerConfig, progress: float) -> float:
    """Share of the way from min_lr to lr that is left, 1 at progress 0 and 0 at progress 1."""
    if optimizer.lr_decay_style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_style == "minus_sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress
