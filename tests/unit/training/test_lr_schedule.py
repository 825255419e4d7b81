"""Learning rates equal their closed forms. `rate(k)` is the rate of the iteration after k completed ones."""

import math
from types import SimpleNamespace

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config, OptimizerConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.training.lr_schedule import last_iteration, learning_rate, next_iteration, samples_left
from mor_megatron.training.progress import Progress


def rates(iterations: int, **settings) -> list[float]:
    config = validate(Config(optimizer=OptimizerConfig(**settings), training=TrainingConfig(train_iters=iterations)))
    return [learning_rate(config.optimizer, k) for k in range(iterations + 2)]


def test_paper_recipe():
    """MoR-360M vanilla (docs/mor.md, sec. 6): warm-up 57, decay 1888 of 9438 iterations, linear to 0."""
    got = rates(9438, lr=3e-3, lr_warmup_iters=57)
    assert got[0] == 0.0
    assert got[1] == pytest.approx(3e-3 / 57)
    assert got[57] == got[9438 - 1888] == 3e-3
    assert got[9438 - 944] == pytest.approx(3e-3 / 2)
    assert got[9437] == pytest.approx(3e-3 / 1888)
    assert got[9438] == got[9439] == 0.0


@pytest.mark.parametrize(
    ("style", "remaining"),
    [("linear", lambda x: 1 - x), ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2)],
)
def test_decay_from_the_end_of_warmup(style, remaining):
    got = rates(30, lr=1.0, min_lr=0.25, lr_warmup_iters=5, lr_decay_iters=25, lr_decay_style=style)
    assert got[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert got[5:26] == pytest.approx([0.25 + 0.75 * remaining(i / 20) for i in range(21)])
    assert got[26:] == [0.25] * 6


def test_constant_ignores_the_end():
    assert rates(4, lr=2.0, lr_warmup_iters=2, lr_decay_style="constant") == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_wsd_minus_sqrt():
    got = rates(10, lr=1.0, min_lr=0.5, lr_wsd_decay_iters=4, lr_wsd_decay_style="minus_sqrt")
    assert got[:7] == [1.0] * 7
    assert got[7:10] == pytest.approx([0.5 + 0.5 * (1 - math.sqrt(i / 4)) for i in (1, 2, 3)])
    assert got[10:] == [0.5, 0.5]


def test_no_rate_between_peak_and_floor_is_left():
    for style in ("linear", "cosine", "WSD"):
        got = rates(50, lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_style=style)
        falling = got[10:]
        assert falling == sorted(falling, reverse=True)
        assert max(got) == 1.0
        assert min(falling) == 0.1


RUNS = {
    "ramp": "--train-samples 1003 --global-batch-size 24 --rampup-batch-size 4 4 300 --lr-warmup-samples 90",
    "ramp that its samples do not divide": "--train-samples 500 --global-batch-size 20 --rampup-batch-size 2 6 100",
    "no ramp": "--train-samples 103 --global-batch-size 10 --lr-decay-samples 90 --lr-wsd-decay-samples 31",
    "fraction of samples": "--train-samples 200 --global-batch-size 10 --lr-warmup-fraction 0.13 --min-lr 1e-4",
    "iterations": "--train-iters 20 --global-batch-size 10 --lr-warmup-iters 3",
    "fraction of iterations": "--train-iters 30 --global-batch-size 10 --lr-warmup-fraction 0.15 --lr-decay-iters 25",
}
STYLES = ["--lr-decay-style cosine", "--lr-decay-style linear", "--lr-decay-style WSD"]


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_batches_and_rates_are_megatrons(flags):
    """Iteration by iteration against Megatron-core's own calculator and scheduler, fed as Megatron-LM feeds them."""
    for style in STYLES:
        if "wsd" in flags and "WSD" not in style:
            continue
        config = validate(read_config(f"{flags} {style} --micro-batch-size 2".split()))
        training, optimizer = config.training, config.optimizer
        ramp, scheduler = _megatron_ramp(training), _megatron_scheduler(config)
        progress = Progress()
        end = last_iteration(config, progress)
        while progress.iteration < end:
            current, lr = next_iteration(config, progress)
            assert lr == pytest.approx(scheduler.get_lr({}), rel=1e-12), progress
            if ramp is not None:
                ramp.update(progress.consumed_samples, True)
                assert current.training.global_batch_size == ramp.current_global_batch_size
            assert last_iteration(config, progress) == end
            progress.iteration += 1
            progress.consumed_samples += current.training.global_batch_size
            scheduler.num_steps = progress.consumed_samples
        if training.train_samples is None:
            assert end == training.train_iters
        else:
            left = training.train_samples - progress.consumed_samples
            assert 0 <= left == samples_left(config, progress) < training.global_batch_size
            assert optimizer.lr_decay_iters is None


def _megatron_ramp(training: TrainingConfig) -> RampupBatchsizeNumMicroBatchesCalculator | None:
    if training.rampup_batch_size is None:
        return None
    return RampupBatchsizeNumMicroBatchesCalculator(
        training.global_batch_size, training.micro_batch_size, 1, False, 1, *training.rampup_batch_size
    )


def _megatron_scheduler(config: Config) -> OptimizerParamScheduler:
    """As `get_optimizer_param_scheduler` of Megatron-LM makes it: all in samples."""
    optimizer, training = config.optimizer, config.training
    unit, factor = ("samples", 1) if training.train_samples else ("iters", training.global_batch_size)
    warmup, decay, wsd = (getattr(optimizer, f"lr_{part}_{unit}") for part in ("warmup", "decay", "wsd_decay"))
    warmup = warmup * factor if optimizer.lr_warmup_fraction is None else optimizer.lr_warmup_fraction * decay * factor
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay * factor,
        lr_decay_style=optimizer.lr_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else wsd * factor,
        lr_wsd_decay_style="linear",
    )


def test_what_a_rollback_left_out_moves_neither_rate_nor_batch_nor_end():
    flags = "--train-samples 400 --global-batch-size 24 --rampup-batch-size 4 4 300 --micro-batch-size 2"
    config = validate(read_config([*flags.split(), "--lr-warmup-samples", "90"]))
    plain, rolled = Progress(10, 60), Progress(10, 60 + 32, left_out_samples=32)
    assert next_iteration(config, plain) == next_iteration(config, rolled)
    assert last_iteration(config, plain) == last_iteration(config, rolled)
    assert samples_left(config, plain) == samples_left(config, rolled) == 340
