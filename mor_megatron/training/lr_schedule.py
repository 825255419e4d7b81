"""What an iteration is told, its learning rate and its global batch, as a pure function of how far the run is.

That is a number of iterations, or with `--train-samples` of samples. A rollback goes back in both.

Off by one, as in Megatron-LM and Hugging Face: the rate of iteration i (counted from 1) is that of i-1 completed
iterations. With warm-up the first iteration therefore has rate 0, and a decay to 0 at T never quite gets there: the
last iteration still has 1/decay of the peak. A skipped step counts as an iteration.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mor_megatron.config.run_length import global_batch_size, iterations_left
from mor_megatron.config.schema import Config, OptimizerConfig
from mor_megatron.training.progress import Progress


def next_iteration(config: Config, progress: Progress) -> tuple[Config, float]:
    """Settings of the iteration after `progress`, its own global batch among them, and its learning rate."""
    training = config.training
    if training.train_samples is None:
        return config, learning_rate(config.optimizer, progress.iteration)
    batch = global_batch_size(training, progress.trained_samples)
    current = replace(config, training=replace(training, global_batch_size=batch))
    return current, learning_rate(config.optimizer, progress.trained_samples)


def last_iteration(config: Config, progress: Progress) -> int:
    """Number of the run's last iteration."""
    return progress.iteration + iterations_left(config.training, progress.iteration, progress.trained_samples)


def samples_left(config: Config, progress: Progress) -> int:
    """Training sequences that the run has still to see, or a few more."""
    training = config.training
    if training.train_samples is None:
        return (training.train_iters - progress.iteration) * training.global_batch_size
    return training.train_samples - progress.trained_samples


def learning_rate(optimizer: OptimizerConfig, completed: int) -> float:
    """Learning rate of the iteration that follows `completed` finished ones, or samples where decay is in samples.

    Warm-up is linear from 0. Then constant; or linear or cosine from `lr` to `min_lr` at `lr_decay_iters`; or WSD,
    which holds `lr` until `lr_wsd_decay_iters` before that and falls linearly or as 1 - sqrt (MoR paper's recipe: WSD,
    linear to 0 over the last fifth).

    Args:
        optimizer: the schedule's settings, validated: the ends of decay are set, in iterations or samples.
        completed: finished iterations or samples, >= 0.
    """
    assert completed >= 0
    peak, warmup, end, length = optimizer.lr, *_spans(optimizer)
    if completed < warmup:
        return peak * completed / warmup
    if optimizer.lr_decay_style == "constant":
        return peak
    if completed >= end:
        return optimizer.min_lr
    if optimizer.lr_decay_style == "WSD":
        start = end - length
        if completed <= start:
            return peak
    else:
        start, length = warmup, end - warmup
    progress = (completed - start) / length
    return optimizer.min_lr + (peak - optimizer.min_lr) * _remaining(optimizer, progress)


def _spans(optimizer: OptimizerConfig) -> tuple[float, int, int | None]:
    """End of warm-up, end of decay, and length of WSD's decay, in the unit of the run."""
    warmup, end, length = optimizer.lr_warmup_iters, optimizer.lr_decay_iters, optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_samples is not None:
        warmup, end = optimizer.lr_warmup_samples, optimizer.lr_decay_samples
        length = optimizer.lr_wsd_decay_samples
    if optimizer.lr_warmup_fraction is not None:
        warmup = optimizer.lr_warmup_fraction * end
    return warmup, end, length


def _remaining(optimizer: OptimizerConfig, progress: float) -> float:
    """Share of the way from min_lr to lr that is left, 1 at progress 0 and 0 at progress 1."""
    if optimizer.lr_decay_style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_style == "minus_sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress
