"""Every layout trains as one process does: loss, router losses and metrics, gradient norm, every parameter.

`pytest tests/distributed/test_layouts.py -m "slow or not slow"` runs the whole table, the default a cross-section in
which every layout and every model occurs.
"""

from __future__ import annotations

import pytest
from layout_runs import describe, differences
from table import LAYOUTS, MODELS, OPTIMIZERS, Layout, build_config

QUICK = {
    "dp2": ["expert-nr2"],
    "dp2-zero0": ["token-loss-free"],
    "dp2-zero2": ["expert-nr3"],
    "dp2-zero3": ["expert-nr3"],
    "tp2": ["expert-gqa"],
    "tp2-sp": ["expert-relaxed"],
    "pp2": ["expert-sharing", "expert-relaxed", "middle-sequence"],
    "pp2-uneven": ["expert-aux-router"],
    "pp2-odd": ["expert-sharing-update"],
    "pp2-zero0": ["expert-untied"],
    "dp4": ["recursive"],
    "tp2-dp2": ["cycle"],
    "tp2-dp2-zero2": ["vanilla"],
    "tp2-pp2": ["token-sharing"],
    "tp2-sp-pp2": ["token-balance"],
    "pp2-dp2": ["expert-nr2"],
    "pp4": ["expert-nr3"],
}
ADAM = {("pp2", "expert-sharing")}
SGD_ONLY = {"tp2-sp-dp2-zero3"}
"""By far the slowest, and made of parts that other layouts run with AdamW."""


def _cells():
    for layout in LAYOUTS:
        for model in MODELS:
            for optimizer in OPTIMIZERS if layout.name not in SGD_ONLY else ("sgd",):
                quick = model in QUICK.get(layout.name, ()) and (optimizer == "sgd" or (layout.name, model) in ADAM)
                name = f"{layout}-{model}-{optimizer}"
                yield pytest.param(layout, model, optimizer, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "model", "optimizer"), _cells())
def test_layout(single, trained, layout: Layout, model: str, optimizer: str):
    expected = single(model, optimizer, layout.global_batch)
    assert (expected.ties > 0) == model.startswith(("expert", "cycle")), "repeated tokens should tie at the cut"
    config = build_config(model, layout, optimizer, seed=expected.seed)
    got = trained(layout, config)
    found = differences(got, expected)
    assert not found, f"{layout}, {model}, {optimizer}: {describe(found)}"
    norms = [report.grad_norm for report in got.reports]
    assert max(norms) > OPTIMIZERS[optimizer].clip_grad, "clipping should be active"
