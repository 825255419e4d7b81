"""Validation losses do not depend on the layout, however tokens are selected; routers that diverge are detected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_runs import my_batches
from megatron.core import parallel_state
from table import LAYOUTS, ONE, TWO, Layout, build_config

from mor_megatron.config.schema import Config
from mor_megatron.distributed.consistency import RoutingMismatchError
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.training.engine import build_engine
from mor_megatron.training.evaluate import evaluate
from mor_megatron.training.train_step import train_step

FP32_TOL = 2e-6  # relative; the same sums in another order, once
MODELS = ["vanilla", "recursive", "expert-nr3", "expert-sharing-update", "middle-sequence", "token-sharing"]
NAMES = ["tp2-sp", "pp2", "tp2-sp-pp2", "pp4"]
QUICK = {("pp2", "expert-nr3"), ("pp2", "token-sharing"), ("tp2-sp-pp2", "expert-sharing-update")}
CELLS = [
    pytest.param(name, model, marks=[] if (name, model) in QUICK else pytest.mark.slow)
    for name in NAMES
    for model in MODELS
]


def validation_losses(config: Config) -> dict[str, float]:
    initialize_distributed(config)
    model = build_model(config)
    batches = (replace(batch, corpus_ids=batch.tokens[:, 0] % 3) for batch in my_batches(config, step=1))
    return evaluate(model, batches, config, iteration=0, corpora=("a", "b", "c", "of no sample"))


@pytest.fixture(scope="module")
def expected(lone_worker):
    known: dict[str, dict[str, float]] = {}

    def get(model: str) -> dict[str, float]:
        if model not in known:
            config = evaluation_config(model, ONE)
            known[model] = lone_worker.run(1, ONE.groups, validation_losses, config)[0]
        return known[model]

    return get


def evaluation_config(model: str, layout: Layout) -> Config:
    return build_config(model, layout, eval_iters=1, eval_fixed_depths=True)


@pytest.mark.parametrize(("name", "model"), CELLS)
def test_validation_losses_equal_those_of_one_process(workers, expected, name, model):
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    results = workers.run(layout.world_size, layout.groups, validation_losses, evaluation_config(model, layout))
    assert all(result == results[0] for result in results), "ranks report different losses"
    assert results[0].keys() == expected(model).keys()
    for loss, value in expected(model).items():
        assert results[0][loss] == (None if value is None else pytest.approx(value, rel=FP32_TOL)), loss
    distinct = len(set(expected(model).values()))
    assert distinct >= build_config(model, ONE).recursion.num_recursions, "depths or selections were ignored"


def test_a_threshold_in_a_ring_of_single_sequences(workers, lone_worker):
    """With one sequence a micro-batch, the shape of its rows does not tell whether all tokens are among them."""
    layout = next(layout for layout in LAYOUTS if layout.name == "pp2")
    configs = [build_config("expert-nr3", each, eval_iters=1, micro_batch_size=1) for each in (ONE, layout)]
    expected = lone_worker.run(1, ONE.groups, validation_losses, configs[0])[0]
    found = workers.run(2, layout.groups, validation_losses, configs[1])[0]
    for loss in ("validation_loss_topk", "validation_loss_threshold"):
        assert found[loss] == pytest.approx(expected[loss], rel=FP32_TOL), loss
    assert expected["validation_loss_topk"] != expected["validation_loss_threshold"]


def train_with_a_drifted_router(config: Config, drifts: bool) -> str:
    """Two iterations, the check in the second; the router of tensor-parallel rank 1 may be another one."""
    initialize_distributed(config)
    engine = build_engine(build_model(config), config)
    engine.module.train()
    try:
        train_step(engine, my_batches(config, 1), config, 1, 0.0)
        if drifts and parallel_state.get_tensor_model_parallel_rank() == 1:
            with torch.no_grad():
                for weight in engine.module.router.parameters():
                    weight.neg_()
        train_step(engine, my_batches(config, 2), config, 2, 0.0)
    except RoutingMismatchError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("model", ["expert-nr3", "token-balance"])
def test_routers_that_drifted_apart_are_noticed(workers, model):
    layout = Layout("tp2", tp=2, global_batch=TWO)
    config = build_config(model, layout)
    config = replace(config, parallel=replace(config.parallel, check_routing_consistency=2))
    healthy = workers.run(2, layout.groups, train_with_a_drifted_router, config, False)
    assert healthy == ["no error"] * 2
    messages = workers.run(2, layout.groups, train_with_a_drifted_router, config, True)
    decision = "active_1" if model == "expert-nr3" else "depth"
    assert messages[0] == messages[1]
    start = f"iteration 2, micro-batch 0: {decision} of tensor-parallel rank 1 differs from that of rank 0: "
    assert messages[0].startswith(start)
