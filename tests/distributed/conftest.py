"""One run of every model and optimizer in a single process, made when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from layout_runs import DECISION_MARGIN, Result, train
from table import GLOBAL_BATCH, ONE, build_config
from worker_pool import WorkerPool


@pytest.fixture(scope="session")
def single(lone_worker: WorkerPool) -> Callable[..., Result]:
    """single(model, optimizer, global_batch, bf16) -> the run that layouts are compared with."""
    known: dict[tuple, Result] = {}

    def run(model: str, optimizer: str = "sgd", global_batch: int = GLOBAL_BATCH, bf16: bool = False) -> Result:
        key = (model, optimizer, global_batch, bf16)
        if key not in known:
            layout = replace(ONE, global_batch=global_batch)
            config = build_config(model, layout, optimizer, bf16=bf16)
            (known[key],) = lone_worker.run(1, ONE.groups, train, config)
            closest = known[key].margin
            assert bf16 or closest > DECISION_MARGIN, f"{model}, {optimizer}: a decision is {closest:.1g} close"
        return known[key]

    return run
