"""How long a run is: in iterations or in samples, with a global batch that may grow; and the schedule of its rates.

As in Megatron-LM, a run measured in samples counts everything in samples: its end, warm-up and decay, and the growth
of its batch. They are functions of the samples trained on, and so do not depend on where a run was stopped.
"""

from __future__ import annotations

from dataclasses import replace

from mor_megatron.config.schema import Config, TrainingConfig

DEFAULT_ITERATIONS = 100

_IN_ITERATIONS = ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters")
_IN_SAMPLES = ("lr_decay_samples", "lr_wsd_decay_samples", "lr_warmup_samples")


def global_batch_size(training: TrainingConfig, trained_samples: int) -> int:
    """Sequences of the iteration that follows `trained_samples`; `rampup_batch_size` as in Megatron-LM.

    Args:
        training: validated.
        trained_samples: sequences trained on so far, over all ranks.
    """
    full, ramp = training.global_batch_size, training.rampup_batch_size
    if ramp is None or trained_samples >= ramp[2]:
        return full
    start, increment, samples = ramp
    return start + trained_samples * ((full - start) // increment) // samples * increment


def iterations_left(training: TrainingConfig, iteration: int, trained_samples: int) -> int:
    """Iterations that a run has still to do after `iteration`; a last batch that exceeds `train_samples` is none."""
    if training.train_samples is None:
        return training.train_iters - iteration
    count, grown = 0, 0 if training.rampup_batch_size is None else training.rampup_batch_size[2]
    while trained_samples < grown:
        trained_samples += global_batch_size(training, trained_samples)
        if trained_samples > training.train_samples:
            return count
        count += 1
    return count + max(0, training.train_samples - trained_samples) // training.global_batch_size


def resolve_length(config: Config) -> Config:
    """Check the settings of length and rates; fill in `train_iters`, or leave it to `train_samples`, and the decay.

    Raises:
        ValueError: two lengths, settings of the other unit, or a warm-up and decay that do not fit.
    """
    training, optimizer = config.training, config.optimizer
    in_samples = training.train_samples is not None
    if not in_samples and training.train_iters is None:
        training = replace(training, train_iters=DEFAULT_ITERATIONS)
    if in_samples and training.train_iters is not None:
        raise ValueError(
            f"train-iters={training.train_iters} and train-samples={training.train_samples} exclude each other: leave "
            "one out (--train-iters None undoes a preset's)"
        )
    for name in _IN_ITERATIONS if in_samples else _IN_SAMPLES:
        if getattr(optimizer, name):
            other, unit = ("samples", "iters") if in_samples else ("iters", "samples")
            undo = f" (--{_flag(name)} {'0' if 'warmup' in name else 'None'} undoes a preset's)" if in_samples else ""
            raise ValueError(
                f"{_flag(name)}={getattr(optimizer, name)} does not go with train-{other}="
                f"{getattr(training, f'train_{other}')}: give --{_flag(name).replace(unit, other)}{undo}, or measure "
                f"the run by --train-{unit}"
            )
    if training.rampup_batch_size is not None:
        _check_ramp(training)
    return _rates(replace(config, training=training))


def _check_ramp(training: TrainingConfig) -> None:
    """What a ramp is by itself; `layout.check_batch` sees whether its batches can be dealt to ranks."""
    shown = f"rampup-batch-size={' '.join(map(str, training.rampup_batch_size))}"
    if training.train_samples is None:
        raise ValueError(f"{shown} grows by samples, and train-iters={training.train_iters}: give --train-samples")
    if len(training.rampup_batch_size) != 3 or min(training.rampup_batch_size) < 1:
        raise ValueError(f"{shown} is not START INCREMENT SAMPLES: give three numbers above 0, such as 32 32 100000")
    if training.global_batch_size is None:
        raise ValueError(f"{shown} grows up to the global batch: give --global-batch-size")
    start, increment, _ = training.rampup_batch_size
    growth = training.global_batch_size - start
    if growth < 0 or growth % increment:
        raise ValueError(
            f"{shown} does not arrive at global-batch-size={training.global_batch_size} in whole steps: use a START "
            "below it, and an INCREMENT that divides their difference"
        )


def _rates(config: Config) -> Config:
    optimizer, training = config.optimizer, config.training
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"min-lr={optimizer.min_lr} exceeds lr={optimizer.lr}: lower min-lr or raise lr")
    unit = "iters" if training.train_samples is None else "samples"
    end = getattr(optimizer, f"lr_decay_{unit}") or getattr(training, f"train_{unit}")
    wsd, warmup = (getattr(optimizer, f"lr_{part}_{unit}") for part in ("wsd_decay", "warmup"))
    warmup_flag = f"lr-warmup-{unit}={warmup}"
    if optimizer.lr_warmup_fraction is not None:
        if warmup:
            raise ValueError(
                f"{warmup_flag} and lr-warmup-fraction={optimizer.lr_warmup_fraction:g} exclude each other: leave one "
                f"out (--lr-warmup-{unit} 0 undoes a preset's)"
            )
        warmup_flag = f"lr-warmup-fraction={optimizer.lr_warmup_fraction:g}"
        warmup = optimizer.lr_warmup_fraction * end
    if optimizer.lr_decay_style == "WSD" and wsd is None:
        # A fifth, rounded: 1888 of the paper's 9438 iterations.
        wsd = min(round(end / 5), max(int(end - warmup), 0))
    if warmup > end:
        raise ValueError(
            f"{warmup_flag} exceeds lr-decay-{unit}={end} (default train-{unit}): warm up for less, or decay later"
        )
    if optimizer.lr_decay_style == "WSD" and warmup + wsd > end:
        raise ValueError(
            f"lr-wsd-decay-{unit}={wsd} after {warmup_flag} does not fit lr-decay-{unit}={end} (default "
            f"train-{unit}): use at most {int(end - warmup)}"
        )
    filled = {f"lr_decay_{unit}": end, f"lr_wsd_decay_{unit}": wsd}
    return replace(config, optimizer=replace(optimizer, **filled))


def _flag(name: str) -> str:
    return name.replace("_", "-")
