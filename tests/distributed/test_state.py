"""Weights, storages and checkpoints of every rank; bf16."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from layout_runs import run_steps, train, unique_elements
from table import LAYOUTS, VOCABULARY, Layout, build_config
from worker_pool import WorkerError

from mor_megatron.config.schema import CheckpointConfig, Config
from mor_megatron.model import build_model
from mor_megatron.parallel.distributed import initialize_distributed
from mor_megatron.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from mor_megatron.training.engine import build_engine

BY_NAME = {layout.name: layout for layout in LAYOUTS}

BF16_LOSS_TOL = 2e-3
"""bf16 keeps 8 bits: a product summed in another order differs by 2^-9 of itself, and a loss averages over many."""
BF16_NORM_TOL = 5e-3
"""The gradient's norm in the first step. Later ones are those of other weights: rounding moves some by a bf16 step."""


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
    slow_but({"tp2-pp2", "pp4"}, ["tp2", "tp2-sp", "tp2-dp2-zero3", "pp2-uneven", "tp2-pp2", "tp2-sp-pp2", "pp4"]),
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


@dataclass
class Resumed:
    """What a rank saw of a run of four steps that was saved after two, and of the two steps from there."""

    differing: list[str]
    same_reports: bool
    elements: tuple[int, int]


def save_and_resume(config: Config, directory: str) -> Resumed:
    config = replace(config, checkpoint=CheckpointConfig(save=directory, load=directory))
    initialize_distributed(config)
    whole = build_engine(build_model(config, VOCABULARY), config)
    run_steps(whole, config, first=1, count=2)
    save_checkpoint(whole, config, Progress(iteration=2), VOCABULARY)
    reports = run_steps(whole, config, first=3, count=2)

    other = replace(config, training=replace(config.training, seed=config.training.seed + 1))
    resumed = build_engine(build_model(other, VOCABULARY), config)
    before = unique_elements(resumed.module)
    assert load_checkpoint(resumed, config, VOCABULARY).iteration == 2
    elements = before, unique_elements(resumed.module)
    again = run_steps(resumed, config, first=3, count=2)
    pairs = zip(whole.module.state_dict().items(), resumed.module.state_dict().values(), strict=True)
    differing = [name for (name, a), b in pairs if torch.is_tensor(a) and not torch.equal(a, b)]
    return Resumed(differing, reports == again, elements)


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", slow_but({"tp2", "pp2"}, ["tp2", "pp2", "tp2-sp", "tp2-pp2", "pp2-dp2"]))
def test_resuming_is_exact(workers, tmp_path, layout, bf16):
    config = build_config("token-loss-free", layout, "adam", bf16=bf16)
    for rank, result in enumerate(
        workers.run(layout.world_size, layout.groups, save_and_resume, config, str(tmp_path))
    ):
        assert not result.differing, f"rank {rank}: {result.differing[0]} and others"
        assert result.same_reports, f"rank {rank}"
        assert result.elements[0] == result.elements[1], f"rank {rank}: storages before and after loading"


def resume_only(config: Config, directory: str) -> None:
    config = replace(config, checkpoint=CheckpointConfig(load=directory))
    initialize_distributed(config)
    load_checkpoint(build_engine(build_model(config, VOCABULARY), config), config, VOCABULARY)


def test_another_layout_is_refused(workers, tmp_path):
    saved = replace(BY_NAME["pp2"], pipeline_layers=(2, 2))
    config = build_config("recursive", saved)
    workers.run(2, saved.groups, save_and_resume, config, str(tmp_path))
    uneven = BY_NAME["pp2-uneven"]
    with pytest.raises(WorkerError, match=r"pipeline-layers=\[3, 1\] does not fit .*=\[2, 2\]: resume in the layout"):
        workers.run(2, uneven.groups, resume_only, build_config("recursive", uneven), str(tmp_path))
    tensor = BY_NAME["tp2"]
    with pytest.raises(WorkerError, match=r"tensor-model-parallel-size=2 does not fit .*=1: resume in the layout"):
        workers.run(2, tensor.groups, resume_only, build_config("recursive", tensor), str(tmp_path))


@pytest.mark.parametrize("model", ["recursive", "expert-nr3"])
@pytest.mark.parametrize("layout", slow_but({"pp2"}, ["tp2", "tp2-sp", "pp2", "tp2-pp2", "tp2-sp-pp2"]))
def test_bf16(workers, single, layout, model):
    expected = single(model, bf16=True)
    config = build_config(model, layout, bf16=True, seed=expected.seed)
    got = workers.run(layout.world_size, layout.groups, train, config)[0]
    for name, value in expected.initial.items():
        assert torch.equal(got.initial[name], value), name
    for step, (a, b) in enumerate(zip(got.reports, expected.reports, strict=True), 1):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=BF16_LOSS_TOL), f"step {step}"
    assert got.reports[0].grad_norm == pytest.approx(expected.reports[0].grad_norm, rel=BF16_NORM_TOL)


def test_rank_numbers(workers):
    """Tensor parallel first, then data, then pipeline parallel: what `expected_elements` is told."""
    layout = BY_NAME["tp2-pp2"]
    assert workers.run(4, layout.groups, stage_of_rank, build_config("recursive", layout)) == [0, 0, 1, 1]


def stage_of_rank(config: Config) -> int:
    initialize_distributed(config)
    assert dist.get_world_size() == 4
    return build_model(config, VOCABULARY).stage
