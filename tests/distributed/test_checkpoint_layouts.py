"""A checkpoint of any layout resumes in any other: the same state, bit for bit, and the same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import Curve, allow_fp16, copy_through, differing, resume, save_halfway
from layout_runs import FP32_LAYOUT_TOL
from table import LAYOUTS, LORA, ONE, Layout, build_config

from mor_megatron.checkpointing.reader import open_checkpoint
from mor_megatron.checkpointing.shards import STEP
from mor_megatron.config.schema import Config

GLOBAL_BATCH = 8
"""Fills a ring of four ranks, and four data-parallel ranks."""
BY_NAME = {layout.name: layout for layout in [ONE, *LAYOUTS]} | {
    "one-zero0": replace(ONE, name="one-zero0", zero=0),
    "one-zero3": replace(ONE, name="one-zero3", zero=3),
    "dp4-zero2": replace(ONE, name="dp4-zero2", dp=4, zero=2),
    "tp2-pp2-zero0": replace(ONE, name="tp2-pp2-zero0", tp=2, pp=2, zero=0),
}
NAMES = ["one", "one-zero0", "dp2-zero0", "dp2", "dp2-zero3", "dp4-zero2", "tp2", "pp2-uneven", "tp2-sp-dp2-zero3"]
NAMES += ["tp2-sp-pp2", "tp2-pp2-zero0", "pp2-dp2", "pp4"]
MODELS = {
    # A second learning rate, routers that are MLPs, capacities that are still falling where the run is resumed; and
    # recursions that differ.
    "expert": (
        "expert-aux-router",
        {"capacity_warmup_iters": 4, **LORA, "recursion_norms": True, "recursion_embedding": True},
    ),
    # A bias that no optimizer holds.
    "token": ("token-loss-free", {}),
}


def config_of(name: str, model: str = "token", bf16: bool = False) -> Config:
    base, changes = MODELS[model]
    layout = replace(BY_NAME[name], global_batch=GLOBAL_BATCH)  # the samples of an iteration are the same in all
    return build_config(base, layout, "adam", bf16=bf16, **changes)


@pytest.fixture(scope="module")
def in_layout(workers, lone_worker):
    """Run a job in a named layout; rank 0's result, or every rank's."""

    def run(name: str, function, *args):
        layout: Layout = BY_NAME[name]
        pool = lone_worker if layout.world_size == 1 else workers
        return pool.run(layout.world_size, layout.groups, function, *args)

    return run


@pytest.fixture(scope="module")
def saved(in_layout, tmp_path_factory):
    """A run that was saved halfway: its directory, and how it went on without a stop on each rank."""
    known: dict[tuple, tuple[str, list[Curve]]] = {}

    def get(name: str, model: str = "token", bf16: bool = False) -> tuple[str, list[Curve]]:
        key = name, model, bf16
        if key not in known:
            directory = str(tmp_path_factory.mktemp("saved"))
            known[key] = directory, in_layout(name, save_halfway, config_of(name, model, bf16), directory)
        return known[key]

    return get


def contents(directory: str | Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, whole, as if one process had written it."""
    reader = open_checkpoint(Path(directory) / "iter_0000002")
    return {
        f"{kind} {name}": torch.tensor(reader.scalar(name)) if kind == STEP else reader.whole(kind, name)
        for name, kinds in reader.kinds.items()
        for kind in kinds
    }


QUICK_COPIES = [("dp2-zero3", "one-zero0", True)]
QUICK_CURVES = [("expert", "tp2-sp-pp2", "dp2-zero3")]
QUICK_SAME = [("tp2-sp-pp2", False), ("dp2-zero3", True)]


def slow_beside(quick: list, everything: list) -> list:
    rest = [pytest.param(*case, marks=pytest.mark.slow) for case in everything if case not in quick]
    return quick + rest


@pytest.mark.parametrize(
    ("source", "target", "bf16"),
    slow_beside(QUICK_COPIES, [(a, b, f) for f in (False, True) for a in NAMES for b in NAMES if a != b]),
)
def test_state_passes_unchanged(in_layout, saved, tmp_path, source, target, bf16):
    """Weights, moments, steps, bias: loaded in another layout and saved again, every bit is where it was."""
    directory, _ = saved(source, bf16=bf16)
    in_layout(target, copy_through, config_of(target, bf16=bf16), directory, str(tmp_path))
    before, after = contents(directory), contents(tmp_path)
    assert {key.split()[0] for key in before} == {"weight", "exp_avg", "exp_avg_sq", "step", "buffer"}
    assert not differing(before, after)


def test_what_recursions_differ_by_passes_unchanged(in_layout, saved, tmp_path):
    """Factors are cut as the weights beside them: tensor parallelism -> a ring -> one process."""
    source, _ = saved("tp2-sp-pp2", "expert")
    before = contents(source)
    assert {len(value.shape) for name, value in before.items() if ".adapters." in name} == {0, 3}
    for name in ("pp2-uneven", "one-zero0"):
        target = str(tmp_path / name)
        in_layout(name, copy_through, config_of(name, "expert"), source, target)
        assert not differing(before, contents(target))
        source = target


@pytest.mark.parametrize(
    ("source", "target"), [("dp2", "one-zero3"), pytest.param("one-zero3", "dp2", marks=pytest.mark.slow)]
)
def test_fp32_and_bf16_take_each_other_up(in_layout, saved, tmp_path, source, target):
    """The optimizer's weights are fp32 in both."""
    from_bf16 = source == "dp2"
    directory, _ = saved(source, bf16=from_bf16)
    in_layout(target, copy_through, config_of(target, bf16=not from_bf16), directory, str(tmp_path))
    assert not differing(contents(directory), contents(tmp_path))


@pytest.mark.parametrize(
    ("model", "source", "target"),
    slow_beside(QUICK_CURVES, [(m, a, b) for m in MODELS for a, b in zip(NAMES, NAMES[5:] + NAMES[:5], strict=True)]),
)
def test_the_curve_goes_on(in_layout, saved, model, source, target):
    directory, (expected, *_) = saved(source, model)
    got = in_layout(target, resume, config_of(target, model), directory)[0]
    for step, (a, b) in enumerate(zip(got.reports, expected.reports, strict=True), 3):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=FP32_LAYOUT_TOL), f"loss of step {step}"
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=FP32_LAYOUT_TOL), f"norm of step {step}"
        assert a.routing == pytest.approx(b.routing, rel=FP32_LAYOUT_TOL), f"step {step}"
    for name, value in (expected.parameters | expected.buffers).items():
        error = ((got.parameters | got.buffers)[name] - value).abs().max() / value.abs().max()
        assert error <= FP32_LAYOUT_TOL, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize(
    ("name", "bf16"), slow_beside(QUICK_SAME, [(name, bf16) for name in NAMES for bf16 in (False, True)])
)
def test_the_same_layout_resumes_bit_for_bit(in_layout, saved, name, bf16):
    """Into an engine that has trained on something else."""
    directory, expected = saved(name, bf16=bf16)
    got = in_layout(name, resume, config_of(name, bf16=bf16), directory, 1)
    for rank, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.reports == b.reports, f"rank {rank}"
        assert a.elements == b.elements, f"rank {rank}: a storage was split or joined by loading"
        assert not differing(a.state, b.state), f"rank {rank}"


MODES = {
    "fp16-zero1": ({"fp16": True}, "one"),
    "fp16-zero3": ({"fp16": True}, "one-zero3"),
    "offloaded": ({"optimizer_cpu_offload": True}, "one"),
    "offloaded-bf16-zero3": ({"optimizer_cpu_offload": True, "bf16": True}, "one-zero3"),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if "zero3" in mode else ()) for mode in MODES]
)
def test_loss_scale_and_offloaded_state_are_kept(lone_worker, tmp_path, mode):
    """fp16 begins with overflows here, so that its loss scale is no longer the initial one."""
    changes, name = MODES[mode]
    if "fp16" in changes:
        lone_worker.run(1, ONE.groups, allow_fp16)
    changes = {"initial_loss_scale": 2.0**40, "hysteresis": 1} | changes if "fp16" in changes else changes
    bf16 = changes.pop("bf16", False)
    config = build_config("token-loss-free", BY_NAME[name], "adam", bf16=bf16, **changes)
    (expected,) = lone_worker.run(1, ONE.groups, save_halfway, config, str(tmp_path))
    (got,) = lone_worker.run(1, ONE.groups, resume, config, str(tmp_path), 1)
    assert got.reports == expected.reports
    assert not differing(got.state, expected.state)
    if "fp16" in mode:
        assert expected.reports[0].loss_scale < 2.0**40
