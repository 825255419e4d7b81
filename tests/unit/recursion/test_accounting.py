"""The published step counts follow from the plan (docs/mor.md, sec. 7)."""

from __future__ import annotations

import pytest

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig
from mor_megatron.recursion.accounting import count_parameters, executed_flops_per_token, paper_flops_per_token

BUDGET = 16.5e18


def config_360m(num_layers=32, **recursion) -> Config:
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=960,
        ffn_hidden_size=2560,
        num_attention_heads=15,
        group_query_attention=True,
        num_query_groups=5,
        vocab_size=49152,
    )
    return Config(model=model, recursion=RecursionConfig(**recursion), data=DataConfig(seq_length=2048))


@pytest.mark.parametrize(
    ("num_layers", "recursion", "steps"),
    [
        (32, {}, 9438),
        (32, {"num_recursions": 2, "routing": "expert_choice"}, 12619),
        (32, {"num_recursions": 3, "routing": "expert_choice"}, 14160),  # published 14161
        (34, {"num_recursions": 4, "routing": "expert_choice"}, 14216),
        (34, {"num_recursions": 4}, 8883),
        (32, {"num_recursions": 3, "routing": "expert_choice", "kv_mode": "sharing"}, 14672),
    ],
)
def test_published_step_counts(num_layers, recursion, steps):
    flops = paper_flops_per_token(config_360m(num_layers, **recursion))
    assert round(BUDGET / (flops * 1024 * 2048)) == steps


@pytest.mark.parametrize(("num_recursions", "millions"), [(1, 314.6), (2, 167.2), (3, 118.0)])
def test_published_parameter_counts(num_recursions, millions):
    count = count_parameters(config_360m(num_recursions=num_recursions))
    assert count.non_embedding / 1e6 == pytest.approx(millions, abs=0.06)


def test_vanilla_unique_is_unrolled():
    count = count_parameters(config_360m())
    assert count.unique == count.unrolled == pytest.approx(361.8e6, abs=0.1e6)


def test_executed_counts_measured_fractions():
    config = config_360m(num_recursions=3, routing="expert_choice")
    planned = executed_flops_per_token(config)
    assert executed_flops_per_token(config, (1.0, 2 / 3, 1 / 3)) == pytest.approx(planned)
    assert executed_flops_per_token(config, (1.0, 1.0, 1.0)) > planned > executed_flops_per_token(config, (1.0, 0, 0))


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab-size"):
        count_parameters(Config())
