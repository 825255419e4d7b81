"""A non-finite gradient on one rank: no rank of any layout updates, the rank is named, and training continues."""

from __future__ import annotations

import pytest
from layout_runs import step_with_a_fault
from table import LAYOUTS, Layout, build_config

QUICK = ("tp2-sp", "pp2")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow) for each in LAYOUTS],
)
def test_all_ranks_skip_together(workers, layout: Layout):
    victim = layout.world_size - 1
    config = build_config("expert-nr3", layout)
    results = workers.run(layout.world_size, layout.groups, step_with_a_fault, config, victim, "gradient")
    # With ZeRO 2 and 3, gradients are other ranks' as well by the time they are looked at.
    faulty = (victim,) if layout.zero < 2 else ()
    expected = {"applied": False, "overflow": False, "faulty": faulty, "unchanged": True, "scale": 1.0, "then": True}
    assert results == [expected] * layout.world_size
