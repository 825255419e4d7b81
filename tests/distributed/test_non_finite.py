"""A gradient that is not finite on one rank: no rank of any layout updates, the rank is named, and training goes on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from layout_runs import my_batches, run_steps
from table import LAYOUTS, VOCABULARY, Layout, build_config

from mor_megatron.config.schema import Config
from mor_megatron.model import build_model
from mor_megatron.parallel.distributed import initialize_distributed
from mor_megatron.parallel.full_state import gather_parameters
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import train_step

QUICK = ("tp2-sp", "pp2", "tp2-pp2")


def spoil_one_rank(config: Config, victim: int) -> dict:
    """A healthy step, one with an infinite gradient on one rank, a healthy one."""
    initialize_distributed(config)
    engine = build_engine(build_model(config, VOCABULARY), config)
    engine.module.train()
    run_steps(engine, config, count=1)
    before = gather_parameters(engine.module)
    hook = None
    if dist.get_rank() == victim:
        weight = [p for name, p in engine.module.named_parameters() if name.endswith("linear_fc1.weight")][-1]
        hook = weight.register_hook(lambda gradient: gradient * math.inf)
    report = train_step(engine, my_batches(config, 2), config, 2, 0.1)
    if hook is not None:
        hook.remove()
    after = gather_parameters(engine.module)
    unchanged = all(torch.equal(after[name], value) for name, value in before.items())
    then = run_steps(engine, config, first=3, count=1)[0]
    return {"applied": report.applied, "faulty": report.faulty_ranks, "unchanged": unchanged, "then": then.applied}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow) for each in LAYOUTS],
)
def test_all_ranks_skip_together(workers, layout: Layout):
    victim = layout.world_size - 1
    config = build_config("expert-nr3", layout)
    results = workers.run(layout.world_size, layout.groups, spoil_one_rank, config, victim)
    # With ZeRO 2 and 3, gradients are other ranks' as well by the time they are looked at.
    faulty = (victim,) if layout.zero < 2 else ()
    assert results == [{"applied": False, "faulty": faulty, "unchanged": True, "then": True}] * layout.world_size
