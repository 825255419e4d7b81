"""The comparison of `test_layouts.py` fails for errors that would not crash, and locates them."""

from __future__ import annotations

import pytest
from faults import (
    adapters_without_one_recursion,
    copy_counted_twice,
    doubled_norm_gradient,
    unreduced_adapter_gradients,
    unreduced_norm_gradient,
    unreduced_router_gradient,
    without_one_recursion,
)
from layout_runs import FP32_LAYOUT_TOL, differences, train
from table import LAYOUTS, build_config

BY_NAME = {layout.name: layout for layout in LAYOUTS}

CONTROLS = [
    ("pp2", without_one_recursion),
    ("pp2", copy_counted_twice),
    ("tp2", doubled_norm_gradient),
    ("tp2-sp", unreduced_norm_gradient),
    ("pp2", adapters_without_one_recursion),
    ("tp2-sp", unreduced_adapter_gradients),
]
MORE = [
    ("dp2", without_one_recursion),
    ("tp2-pp2", without_one_recursion),
    ("tp2-sp", unreduced_router_gradient),
    ("dp2-zero3", adapters_without_one_recursion),
]
RELAXED = {adapters_without_one_recursion, unreduced_adapter_gradients}


def _cases():
    for name, fault in CONTROLS + MORE:
        marks = pytest.mark.slow if (name, fault) in MORE else ()
        yield pytest.param(BY_NAME[name], fault, id=f"{name}-{fault.__name__}", marks=marks)


@pytest.mark.parametrize(("layout", "fault"), _cases())
def test_the_comparison_sees(workers, single, layout, fault):
    model = "expert-relaxed" if fault in RELAXED else "expert-nr3"
    expected = single(model, global_batch=layout.global_batch)
    config = build_config(model, layout, seed=expected.seed)
    found = differences(workers.run(layout.world_size, layout.groups, train, config, fault)[0], expected)
    assert found, f"{fault.__name__} went unnoticed"
    # The forward pass of the first step is right, so the norm of its gradient must be the first to differ; or the next
    # loss, where the weight has a small part in the norm, as a router has.
    assert found[0][0] in ("step 1: grad_norm", "step 2: lm_loss")
    assert max(error for _, error in found) > 100 * FP32_LAYOUT_TOL
