"""Frozen weights stay as they are, bit for bit, and the others train as in one process, in every layout and mode."""

from __future__ import annotations

import pytest
from checkpoint_jobs import differing, resume, save_halfway
from layout_runs import describe, differences
from table import LAYOUTS, Layout, build_config

BY_NAME = {layout.name: layout for layout in LAYOUTS}
ROUTERS = ("expert-aux-router", "all-but-routers")
BASE = ("expert-relaxed", "base")  # with adapters, norms and vectors of each recursion
SHARING = ("expert-relaxed-gqa", "all-but-routers")  # recursions after the first project queries alone
CASES = [
    ("tp2-sp", *BASE),
    ("tp2", *SHARING),
    ("pp2", *ROUTERS),  # the last stage has nothing to train
]
NAMES = ["dp2-zero0", "dp2", "dp2-zero2", "dp2-zero3", "tp2-sp", "tp2-sp-dp2-zero3", "pp2", "tp2-sp-pp2", "pp2-zero0"]
SLOW = [case for kind in (ROUTERS, BASE) for name in NAMES if (case := (name, *kind)) not in CASES]
SLOW.append(("tp2-sp", *SHARING))


def is_trained(name: str, freeze: str = "all-but-routers") -> bool:
    if freeze == "base" and (".adapters." in name or name.startswith("recursion_embedding")):
        return True
    if freeze == "base" and name.endswith("norm.weight"):
        return name.startswith("layers.") and name.split(".")[1] not in ("0", "5")  # unique layers, and the final norm
    return name.startswith("router.")


def cases(quick: list, slow: list) -> list:
    marked = [(case, ()) for case in quick] + [(case, pytest.mark.slow) for case in slow]
    return [pytest.param(*case, id="-".join(map(str, case)), marks=mark) for case, mark in marked]


@pytest.mark.parametrize(("name", "model", "freeze"), cases(CASES, SLOW))
def test_layouts(single, trained, name: str, model: str, freeze: str):
    layout = BY_NAME[name]
    expected = single(model, "adam", layout.global_batch, freeze=freeze)
    got = trained(layout, build_config(model, layout, "adam", seed=expected.seed, freeze=freeze))
    found = differences(got, expected, trained=lambda name: is_trained(name, freeze))
    assert not found, f"{layout}: {describe(found)}"


RESUMED = [("dp2-zero3", True)]
RESUMED_SLOWLY = [("pp2", True), ("pp2-zero0", True), ("dp2-zero2", True), ("pp2", False), ("dp2-zero3", False)]


@pytest.mark.parametrize(("name", "bf16"), cases(RESUMED, RESUMED_SLOWLY))
def test_resumption(workers, tmp_path, name: str, bf16: bool):
    """Into an engine of other weights; the checkpoint has all weights, and moments of routers alone."""
    layout: Layout = BY_NAME[name]
    config = build_config("expert-aux-router", layout, "adam", bf16=bf16, freeze="all-but-routers")
    run = layout.world_size, layout.groups
    expected = workers.run(*run, save_halfway, config, str(tmp_path))
    got = workers.run(*run, resume, config, str(tmp_path))
    for rank, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.reports == b.reports, f"rank {rank}"
        assert not differing(a.state, b.state), f"rank {rank}"
        moments = {key.split()[0] for key in b.state if key.endswith("exp_avg")}
        assert all(is_trained(key) for key in moments), f"rank {rank}"
