"""Weights and storages of every rank; bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from checkpoint_jobs import new_engine, save_halfway, with_directory
from layout_runs import assert_close_in_bf16, train, unique_elements
from table import LAYOUTS, VOCABULARY, Layout, build_config

from mor_megatron.checkpointing.load import load_checkpoint
from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model

BY_NAME = {layout.name: layout for layout in LAYOUTS}


def slow_but(quick: set[str], names: list[str]) -> list:
    return [pytest.param(BY_NAME[n], id=n, marks=() if n in quick else pytest.mark.slow) for n in names]


def expected_elements(layout: Layout, stage: int) -> int:
    """Parameters of one rank of the expert-nr3 model, from its sizes alone: H 32, F 48, 4 heads of 8, K 4."""
    width, inner, tp, pp = 32, 48, layout.tp, layout.pp
    held = (layout.pipeline_layers or (4 // pp,) * pp)[stage]
    first, last = stage == 0, stage == pp - 1
    layers = held + first + last
    padded = -(-VOCABULARY // (6 * tp)) * 6 * tp
    per_layer = (4 * width * width + 3 * width * inner) // tp + 2 * width
    copies = 1 if pp == 1 else first + last  # the tied embedding and its copy beside the head
    return layers * per_layer + copies * padded * width // tp + (3 * width if first else 0) + (width if last else 0)


@pytest.mark.parametrize(
    "layout",
    slow_but({"tp2-pp2"}, ["tp2", "tp2-sp", "tp2-dp2-zero3", "pp2-uneven", "tp2-pp2", "tp2-sp-pp2", "pp4"]),
)
def test_every_rank_holds_its_part_once(workers, single, layout):
    split = (1,) * 4 if layout.pp == 4 else layout.pipeline_layers or (2, 2)
    layout = replace(layout, pipeline_layers=split) if layout.pp > 1 else layout
    one = single("expert-nr3")
    config = build_config("expert-nr3", layout, seed=one.seed)
    results = workers.run(layout.world_size, layout.groups, train, config)
    for rank, result in enumerate(results):
        expected = expected_elements(layout, stage=rank // (layout.tp * layout.dp))
        assert result.storages == {"built": expected, "wrapped": expected}, f"rank {rank}"
    for name, value in one.initial.items():
        assert torch.equal(results[0].initial[name], value), f"initial {name} depends on the layout"


def elements_after_loading(config: Config, directory: str) -> int:
    save_halfway(config, directory)
    engine = new_engine(config, seed=config.training.seed + 1)
    load_checkpoint(engine, with_directory(config, directory))
    return unique_elements(engine.module)


@pytest.mark.parametrize("layout", slow_but({"pp2-uneven"}, ["tp2", "tp2-dp2-zero3", "pp2-uneven"]))
def test_loading_makes_no_copies(workers, tmp_path, layout):
    config = build_config("expert-nr3", layout)
    counts = workers.run(layout.world_size, layout.groups, elements_after_loading, config, str(tmp_path))
    assert counts == [expected_elements(layout, rank // (layout.tp * layout.dp)) for rank in range(layout.world_size)]


@pytest.mark.parametrize("model", [pytest.param("recursive", marks=pytest.mark.slow), "expert-nr3"])
@pytest.mark.parametrize("layout", slow_but({"pp2"}, ["tp2", "tp2-sp", "pp2", "tp2-pp2", "tp2-sp-pp2"]))
def test_bf16(workers, single, layout, model):
    expected = single(model, bf16=True)
    config = build_config(model, layout, bf16=True, seed=expected.seed)
    got = workers.run(layout.world_size, layout.groups, train, config)[0]
    assert_close_in_bf16(got, expected)


def test_rank_numbers(workers):
    """Tensor parallel first, then data, then pipeline parallel: what `expected_elements` is told."""
    layout = BY_NAME["tp2-pp2"]
    assert workers.run(4, layout.groups, stage_of_rank, build_config("recursive", layout)) == [0, 0, 1, 1]


def stage_of_rank(config: Config) -> int:
    initialize_distributed(config)
    assert dist.get_world_size() == 4
    return build_model(config).stage
