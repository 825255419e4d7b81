"""The four sharing strategies, depth rounding and KV sources (paper table 1, docs/mor.md, sec. 2)."""

from __future__ import annotations

import pytest

from mor_megatron.recursion.plan import STRATEGIES, build_plan, default_capacities, effective_depth


def physical(plan):
    return [layer.physical for layer in plan.layers]


def recursions(plan):
    return [layer.recursion for layer in plan.layers]


@pytest.mark.parametrize(
    ("strategy", "layers", "expected"),
    [
        ("cycle", 6, [0, 1, 0, 1, 0, 1]),
        ("sequence", 6, [0, 0, 0, 1, 1, 1]),
        ("middle_cycle", 8, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle_sequence", 8, [0, 1, 1, 1, 2, 2, 2, 3]),
    ],
)
def test_sharing(strategy, layers, expected):
    plan = build_plan(layers, 3, strategy)
    assert physical(plan) == expected
    assert plan.num_physical_layers == max(expected) + 1
    assert plan.block_size == 2
    assert [len(plan.pass_layers(r)) for r in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("strategy", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_one_recursion_shares_nothing(strategy):
    for depth in (1, 2, 7):
        plan = build_plan(depth, 1, strategy)
        assert physical(plan) == list(range(depth))
        assert recursions(plan) == [0] * depth


def test_kv_sources():
    assert all(layer.kv_source == layer.index for layer in build_plan(8, 3).layers)
    shared = build_plan(8, 3, kv_mode="sharing")
    assert [layer.kv_source for layer in shared.layers] == [0, 1, 2, 1, 2, 1, 2, 7]
    assert [layer.kv_source for layer in build_plan(6, 3, "sequence", "sharing").layers] == [0, 0, 0, 3, 3, 3]


def test_capacity_of_layers():
    plan = build_plan(8, 3, capacities=default_capacities(3))
    assert [plan.capacity(layer) for layer in plan.layers] == [1, 1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1]


@pytest.mark.parametrize(
    ("layers", "num_recursions", "down", "up"), [(30, 3, 29, 32), (32, 4, 30, 34), (24, 3, 23, 26), (24, 4, 22, 26)]
)
def test_depth_rounding(layers, num_recursions, down, up):
    with pytest.raises(ValueError, match=f"use {down} or {up}"):
        effective_depth(layers, num_recursions, "middle_cycle")
    assert effective_depth(layers, num_recursions, "middle_cycle", "down") == down
    assert effective_depth(layers, num_recursions, "middle_cycle", "up") == up


@pytest.mark.parametrize("layers", [2, 4])
def test_too_few_layers(layers):
    with pytest.raises(ValueError, match="at least 5"):
        effective_depth(layers, 3, "middle_cycle", "down")


def test_one_capacity_per_recursion():
    with pytest.raises(ValueError, match="capacity"):
        build_plan(8, 3, capacities=(1.0, 0.5))


def test_table():
    out = build_plan(8, 3, kv_mode="sharing").table()
    assert "8 virtual layers on 4 unique ones (block of 2)" in out
    assert "virtual 2" in out.splitlines()[-2]


@pytest.mark.parametrize(
    ("layers", "kv_mode", "told"),
    [
        ([(0, 0), (0, 1)], "caching", "lays out 2 layers: return as many as the depth"),
        ([(1, 0), (0, 0), (1, 1), (0, 1)], "caching", "number physical layers from 0 in the order of first use"),
        ([(0, None), (1, None), (2, 0), (2, 0)], "caching", "give shared layers the recursions 0 to 1"),
        ([(0, 0), (1, None), (0, 1), (2, None)], "caching", "put unique layers before or after them"),
        ([(0, None), (0, 0), (0, 1), (1, None)], "caching", "uses a unique layer twice: give it a recursion"),
        ([(0, 0), (0, 0), (0, 1), (0, 1)], "sharing", "use kv-mode=caching, not sharing"),
        ([(0, 0), (1, 0), (0, 1), (2, 1)], "sharing_update", "use kv-mode=caching, not sharing_update"),
    ],
)
def test_a_strategy_that_breaks_a_rule_is_refused(monkeypatch, layers, kv_mode, told):
    monkeypatch.setitem(STRATEGIES, "mine", lambda depth, num_recursions: layers)
    with pytest.raises(ValueError, match=f"sharing-strategy=mine .*{told}"):
        build_plan(4, 2, "mine", kv_mode)


def test_ranks_hold_consecutive_layers(monkeypatch):
    for strategy, depth in (("cycle", 6), ("sequence", 6), ("middle_cycle", 8), ("middle_sequence", 8)):
        assert build_plan(depth, 2, strategy).fits_pipeline
        assert build_plan(depth, 1, strategy).fits_pipeline
    there_and_back = [(0, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 1)]
    mirrored = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    for layers, is_cyclic in ((there_and_back, True), (mirrored, False)):
        monkeypatch.setitem(STRATEGIES, "mine", lambda depth, num_recursions, layers=layers: layers)
        plan = build_plan(6, 2, "mine")
        assert plan.is_cyclic == is_cyclic
        assert not plan.fits_pipeline, "a ring would run other layers in between"
