"""Learning rates against their closed forms. `rate(k)` is that of the iteration after k finished ones."""

import math

import pytest

from mor_megatron.config.schema import Config, OptimizerConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.training.schedule import learning_rate


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
