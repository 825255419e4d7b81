"""The bytes and parameters that planning/memory.py predicts, compared with those of real engines."""

from __future__ import annotations

import footprint
import pytest
from layout_runs import my_batches
from table import LAYOUTS, build_config
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.memory import rank_parameters, rank_state
from mor_megatron.planning.stages import pipeline_plan
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import train_step

PADDING = 0.02  # of these small models; DeepSpeed rounds what it divides up, and Adam keeps a step count a tensor
BY_NAME = {layout.name: layout for layout in LAYOUTS}
CASES = [
    *((name, "expert-nr3", "adam", False) for name in ("dp2-zero0", "dp2", "dp2-zero2", "dp2-zero3")),
    *((name, "expert-nr3", "adam", True) for name in ("dp2-zero0", "dp2", "dp2-zero2", "dp2-zero3")),
    ("dp2", "vanilla", "sgd", False),
    ("pp2-uneven", "token-relaxed", "adam", False),
    ("tp2", "expert-gqa", "adam", False),
    ("tp2-pp2", "expert-untied", "adam", False),
    ("pp4", "expert-aux-router", "adam", False),
    ("tp2-pp2", "expert-relaxed", "adam", False),
]

QUICK = [CASES[0], CASES[3], CASES[5], CASES[6], *CASES[8:10], CASES[13]]
"""Every ZeRO stage and kind of layout once."""


def measure(config: Config) -> tuple[int, int, int, int, int]:
    """Parameters, those of the largest tensor; bytes of weights, gradients, optimizer state before the update."""
    initialize_distributed(config)
    model = build_model(config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine = build_engine(model, config)
    engine.module.train()
    held = []
    step = engine.deepspeed.step

    def look_and_step() -> None:
        tensors = footprint.weights(model), gradients(engine.deepspeed), optimizer_state(engine.deepspeed)
        held[:] = [footprint.nbytes(part) for part in tensors]
        step()

    engine.deepspeed.step = look_and_step
    for iteration in (1, 2):
        train_step(engine, my_batches(config, iteration), config, iteration, 0.01)
    return sum(sizes), max(sizes), *held


def gradients(engine) -> list[Tensor]:
    shares = getattr(engine.optimizer, "all_grad_tensors", {})  # ZeRO-2
    return footprint.gradients(engine) + [tensor for share in shares.values() for tensor in share or ()]


def optimizer_state(engine) -> list[Tensor]:
    # ZeRO-3 hands its fp32 copies to the optimizer only during the update.
    return footprint.optimizer_state(engine) + list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", ()))


@pytest.mark.parametrize(
    ("name", "model", "optimizer", "bf16"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda value: str(value),
)
def test_the_table_is_what_engines_hold(workers, name, model, optimizer, bf16):
    layout = BY_NAME[name]
    config = build_config(model, layout, optimizer, bf16=bf16)
    pipeline = pipeline_plan(config)
    found = workers.run(layout.world_size, layout.groups, measure, config)
    for rank, (parameters, largest, *held) in enumerate(found):
        stage = rank * layout.pp // layout.world_size
        planned = rank_state(config, rank_parameters(config, pipeline, stage), layout.world_size)
        # ZeRO-2 keeps the whole gradient of a tensor that two ranks divide.
        boundary = 4 * largest if layout.zero == 2 else 0
        assert parameters == planned.parameters, f"rank {rank}"
        assert held[0] == pytest.approx(planned.weights, rel=PADDING), f"rank {rank}"
        assert held[1] == pytest.approx(planned.gradients, rel=PADDING, abs=boundary), f"rank {rank}"
        assert held[2] == pytest.approx(planned.optimizer, rel=PADDING), f"rank {rank}"
