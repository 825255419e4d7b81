"""DeepSpeed's own backward pass on two ranks: partitioned weights, ranks that run different layers, faults."""

from __future__ import annotations

import math

import pytest
import torch.distributed as dist
from layout_runs import describe, differences, my_batches, run_steps, step_with_a_fault, train
from table import Layout, build_config

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.training.engine import build_engine
from mor_megatron.training.evaluate import evaluate

ZERO2, ZERO3 = Layout("dp2-zero2", dp=2, zero=2), Layout("dp2-zero3", dp=2, zero=3)
SEQUENCE2 = Layout("tp2-sp-zero2", tp=2, zero=2, sequence_parallel=True)
SEQUENCE3 = Layout("tp2-sp-zero3", tp=2, zero=3, sequence_parallel=True)


@pytest.fixture
def partitioned(tmp_path):
    """Training settings with which ZeRO-3 partitions also the tiniest weight."""
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return {"deepspeed_config": str(path)}


def start(config: Config):
    initialize_distributed(config)
    engine = build_engine(build_model(config), config)
    engine.module.train()
    return engine


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(ZERO3, "expert-sharing", id="dp2-zero3-expert-sharing"),
        pytest.param(ZERO3, "token-balance", id="dp2-zero3-token-balance", marks=pytest.mark.slow),
        pytest.param(SEQUENCE2, "expert-nr3", id="tp2-sp-zero2-expert-nr3"),
        pytest.param(SEQUENCE3, "token-sharing", id="tp2-sp-zero3-token-sharing", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "offload"])
def test_partitions_train_as_one_process_does(workers, single, partitioned, layout, model, offload):
    settings = partitioned if layout.zero == 3 else {}
    expected = single(model)
    config = build_config(model, layout, seed=expected.seed, optimizer_cpu_offload=offload, **settings)
    found = differences(workers.run(layout.world_size, layout.groups, train, config)[0], expected)
    assert not found, describe(found)


def train_with_another_depth(config: Config) -> list[float]:
    """On rank 1 every token leaves after the first recursion, on rank 0 some go on."""
    engine = start(config)
    if dist.get_rank() == 1:
        engine.module.router.balance_bias[0] = 10.0
    reports = run_steps(engine, config, count=2)
    evaluate(engine.module, my_batches(config, step=9), config, iteration=2)
    return [report.lm_loss for report in reports]


def test_ranks_of_zero_3_may_route_to_different_depths(workers, partitioned):
    """Weights of a block are gathered by all ranks together; one that skips it would leave the others waiting."""
    config = build_config("token-loss-free", ZERO3, eval_iters=1, **partitioned)
    zero, one = workers.run(2, ZERO3.groups, train_with_another_depth, config)
    assert zero == one
    assert all(math.isfinite(loss) for loss in zero)


def evaluate_after_training(config: Config) -> dict[str, float]:
    engine = start(config)
    run_steps(engine, config, count=1)
    return evaluate(engine.module, my_batches(config, step=9), config, iteration=1)


def test_zero_3_evaluates_as_zero_1_does(workers, partitioned):
    """Evaluation runs the bare model, and shared keys make layers read a part of another module's weight."""
    one, three = (
        workers.run(2, layout.groups, evaluate_after_training, build_config("expert-sharing", layout, **settings))[0]
        for layout, settings in ((Layout("dp2", dp=2), {"eval_iters": 1}), (ZERO3, partitioned | {"eval_iters": 1}))
    )
    assert three == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        pytest.param(ZERO2, "gradient", id="gradient-zero2"),
        pytest.param(ZERO3, "loss", id="loss-zero3"),
        pytest.param(ZERO2, "loss", id="loss-zero2", marks=pytest.mark.slow),
        pytest.param(ZERO3, "gradient", id="gradient-zero3", marks=pytest.mark.slow),
    ],
)
def test_a_fault_on_one_rank_skips_the_step_on_all(workers, partitioned, layout, where):
    settings = partitioned if layout.zero == 3 else {}
    results = workers.run(2, layout.groups, step_with_a_fault, build_config("expert-nr3", layout, **settings), 1, where)
    faulty = (1,) if where == "loss" else ()
    expected = {"applied": False, "overflow": False, "faulty": faulty, "unchanged": True, "scale": 1.0, "then": True}
    assert results == [expected, expected]


def test_an_overflow_on_one_rank_lowers_the_scale_on_all(workers):
    config = build_config("expert-nr3", ZERO2, fp16=True, initial_loss_scale=1024.0, hysteresis=1)
    results = workers.run(2, ZERO2.groups, step_with_a_fault, config, 1, "gradient")
    expected = {"applied": False, "overflow": True, "faulty": (), "unchanged": True, "scale": 512.0, "then": True}
    assert results == [expected, expected]
