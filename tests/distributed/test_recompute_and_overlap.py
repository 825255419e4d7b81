"""Recomputed activations and overlapped messages of the ring do not change a bit of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_runs import Result, train
from table import LAYOUTS, build_config

BY_NAME = {layout.name: layout for layout in LAYOUTS}
RECURSION = {"recompute_granularity": "full", "recompute_unit": "recursion"}
LAYER = {"recompute_granularity": "full", "recompute_unit": "layer"}
SELECTIVE = {"recompute_granularity": "selective"}

QUICK = [
    ("pp2", "expert-sharing", False, RECURSION),
    ("tp2-sp", "expert-nr3", False, SELECTIVE),
    ("dp2-zero3", "expert-nr3", False, RECURSION),
]
SLOW = [
    ("pp2", "expert-sharing", True, LAYER),
    ("pp2", "token-sharing", False, RECURSION),
    ("dp2-zero3", "expert-sharing", True, LAYER),
]


def same_bits(got: Result, expected: Result) -> None:
    assert got.reports == expected.reports
    assert got.final.keys() == expected.final.keys()
    different = [name for name, value in expected.final.items() if not torch.equal(got.final[name], value)]
    assert not different


def _name(case: tuple) -> str:
    layout, model, bf16, changes = case
    kind = changes.get("recompute_unit", "core")
    return f"{layout}-{model}-{'bf16' if bf16 else 'fp32'}-{kind}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=_name(case), marks=() if case in QUICK else pytest.mark.slow) for case in QUICK + SLOW],
)
def test_recomputation(single, trained, case):
    name, model, bf16, changes = case
    layout = BY_NAME[name]
    seed = single(model).seed
    with_it, without = (build_config(model, layout, bf16=bf16, seed=seed, **more) for more in (changes, {}))
    same_bits(trained(layout, with_it), trained(layout, without))


@pytest.mark.parametrize("model", ["expert-nr3", "token-sharing"])
def test_messages_overlapped_or_waited_for(workers, model):
    layout = BY_NAME["pp2"]
    results = []
    for choice in ("on", "off"):
        config = build_config(model, layout)
        config = replace(config, parallel=replace(config.parallel, overlap_p2p_comm=choice))
        results.append(workers.run(layout.world_size, layout.groups, train, config)[0])
    same_bits(*results)
