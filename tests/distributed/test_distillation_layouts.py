"""In every layout a model learns from a teacher as it does in one process.

The teacher has grouped-query attention and a width of its own; the ranks that have the head run it.
"""

from __future__ import annotations

import pytest
import torch
from layout_runs import assert_close_in_bf16, describe, differences
from table import LAYOUTS, SEQ_LENGTH, VOCABULARY, Layout, build_config
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.config.schema import Config
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.planning.memory import rank_memory
from mor_megatron.planning.stages import pipeline_plan

BY_NAME = {layout.name: layout for layout in LAYOUTS}
PLAIN: dict = {}
LAYER = {"recompute_granularity": "full", "recompute_unit": "layer"}
RECURSION = {"recompute_granularity": "full", "recompute_unit": "recursion"}
SELECTIVE = {"recompute_granularity": "selective"}
QUICK = [("tp2-sp", LAYER), ("pp2", PLAIN)]
SLOW = [(name, PLAIN) for name in ("tp2-sp", "dp2-zero3", "tp2", "dp2-zero2", "pp2-dp2", "tp2-sp-pp2")]
SLOW += [("tp2-sp-dp2-zero3", PLAIN), ("tp2-sp", SELECTIVE), ("pp2", SELECTIVE), ("pp2", RECURSION)]
SLOW += [("dp2-zero3", RECURSION), ("dp2-zero2", LAYER)]
IN_BF16 = [("tp2-sp", LAYER)]
IN_BF16_SLOW = [(name, PLAIN) for name in ("tp2-sp", "pp2", "dp2", "dp2-zero2", "dp2-zero3", "tp2-sp-pp2")]
IN_BF16_SLOW += [("pp2", RECURSION), ("tp2-sp", SELECTIVE), ("dp2-zero3", LAYER)]


def cases(quick: list, slow: list) -> list:
    marked = [(case, ()) for case in quick] + [(case, pytest.mark.slow) for case in slow]
    return [pytest.param(*case, id="-".join((case[0], *case[1].values())), marks=mark) for case, mark in marked]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    """Settings of a run that has one."""
    path = tmp_path_factory.mktemp("teacher")
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQ_LENGTH, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(path)
    return {"distill_from": str(path), "distill_weight": 0.6, "distill_temperature": 2.0}


def bytes_on_rank_0(layout: Layout, config: Config) -> int:
    """Of the teacher, as planned."""
    pipeline = pipeline_plan(config, teacher_settings(config))
    return rank_memory(config, pipeline, 0, layout.world_size, cuda=False).teacher


@pytest.mark.parametrize(("name", "recomputation"), cases(QUICK, SLOW))
def test_distillation(single, trained, teacher, name, recomputation):
    layout = BY_NAME[name]
    expected = single("expert-nr2", global_batch=layout.global_batch, **teacher)
    assert min(report.divergence for report in expected.reports) > 0.1
    config = build_config("expert-nr2", layout, seed=expected.seed, **teacher, **recomputation)
    got = trained(layout, config)
    found = differences(got, expected)
    assert not found, f"{layout}: {describe(found)}"
    assert got.storages.get("teacher", 0) == bytes_on_rank_0(layout, config)


@pytest.mark.parametrize(("name", "recomputation"), cases(IN_BF16, IN_BF16_SLOW))
def test_distillation_in_bf16(single, trained, teacher, name, recomputation):
    layout = BY_NAME[name]
    expected = single("expert-nr2", global_batch=layout.global_batch, bf16=True, **teacher)
    config = build_config("expert-nr2", layout, bf16=True, seed=expected.seed, **teacher, **recomputation)
    got = trained(layout, config)
    assert_close_in_bf16(got, expected)
    assert got.storages.get("teacher", 0) == bytes_on_rank_0(layout, config)
