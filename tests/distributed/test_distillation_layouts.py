"""In every layout a model learns from a teacher as it does in one process.

The teacher has grouped-query attention and a width of its own; the ranks that have the head run it.
"""

from __future__ import annotations

import pytest
from layout_runs import describe, differences
from table import LAYOUTS, SEQ_LENGTH, VOCABULARY, build_config
from transformers import LlamaConfig, LlamaForCausalLM

BY_NAME = {layout.name: layout for layout in LAYOUTS}
QUICK = ["tp2-sp", "pp2"]
SLOW = ["dp2-zero3", "tp2", "dp2-zero2", "pp2-dp2", "tp2-sp-pp2", "tp2-sp-dp2-zero3"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    """Settings of a run that has one."""
    path = tmp_path_factory.mktemp("teacher")
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQ_LENGTH, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(path)
    return {"distill_from": str(path), "distill_weight": 0.6, "distill_temperature": 2.0}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_distillation(single, trained, teacher, name):
    layout = BY_NAME[name]
    expected = single("expert-nr2", global_batch=layout.global_batch, **teacher)
    assert min(report.divergence for report in expected.reports) > 0.1
    got = trained(layout, build_config("expert-nr2", layout, seed=expected.seed, **teacher))
    found = differences(got, expected)
    assert not found, f"{layout}: {describe(found)}"
