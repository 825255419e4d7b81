"""One run of every model and optimizer in a single process, made when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from layout_runs import DECISION_MARGIN, Result, train
from table import GLOBAL_BATCH, ONE, Layout, build_config
from worker_pool import WorkerPool

from mor_megatron.config.schema import Config

SEEDS = range(10)
"""The first whose routing decisions are all clear ones is taken: the same on every machine, but for rounding."""


@pytest.fixture(scope="session")
def single(lone_worker: WorkerPool) -> Callable[..., Result]:
    """single(model, optimizer, global_batch, bf16, changes) -> the run, with its seed, to compare layouts with."""
    known: dict[tuple, Result] = {}

    def run(
        model: str, optimizer: str = "sgd", global_batch: int = GLOBAL_BATCH, bf16: bool = False, **changes
    ) -> Result:
        key = (model, optimizer, global_batch, bf16, *changes.items())
        layout = replace(ONE, global_batch=global_batch)
        for seed in SEEDS if key not in known else ():
            config = build_config(model, layout, optimizer, bf16=bf16, seed=seed, **changes)
            (result,) = lone_worker.run(1, ONE.groups, train, config)
            if bf16 or result.margin > DECISION_MARGIN:
                known[key] = result
                break
        return known[key]

    return run


@pytest.fixture(scope="session")
def trained(workers: WorkerPool) -> Callable[[Layout, Config], Result]:
    """trained(layout, config) -> the run as rank 0 sees it; tests that want the same one share it."""
    known: dict[tuple, Result] = {}

    def run(layout: Layout, config: Config) -> Result:
        key = layout.world_size, config
        if key not in known:
            known[key] = workers.run(layout.world_size, layout.groups, train, config)[0]
        return known[key]

    return run
