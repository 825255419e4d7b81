"""The published step counts follow from the plan (docs/mor.md, sec. 7)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig, TrainingConfig
from mor_megatron.planning.accounting import (
    count_parameters,
    dense_equivalent,
    executed_flops_per_token,
    iterations_for_budget,
    kv_bytes_per_token,
    layer_flops_per_token,
    training_flops_per_token,
)

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
    return Config(
        model=model,
        recursion=RecursionConfig(**recursion),
        data=DataConfig(seq_length=2048),
        training=TrainingConfig(global_batch_size=1024),
    )


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
    assert iterations_for_budget(config_360m(num_layers, **recursion), BUDGET) == steps


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


def test_recomputation_is_hardwares_work_and_not_the_models():
    config = config_360m(num_recursions=3, routing="expert_choice", kv_mode="sharing")
    forward, layers = executed_flops_per_token(config), sum(layer_flops_per_token(config))
    attention = layers - sum(layer_flops_per_token(replace(config, data=replace(config.data, seq_length=0))))
    for granularity, again in ((None, 0.0), ("selective", attention), ("full", layers)):
        training = replace(config.training, recompute_granularity=granularity)
        flops = training_flops_per_token(replace(config, training=training))
        assert flops.model == pytest.approx(3 * forward)
        assert flops.hardware == pytest.approx(3 * forward + again)


@pytest.mark.parametrize("kv_mode", ["caching", "sharing", "sharing_update"])
def test_dense_equivalent_is_the_unrolled_vanilla_model(kv_mode):
    config = config_360m(34, num_recursions=4, routing="expert_choice", kv_mode=kv_mode)
    dense = dense_equivalent(config)
    assert dense == config_360m(34)
    assert count_parameters(dense).unique == count_parameters(config).unrolled
    assert dense_equivalent(dense) == dense


def test_bytes_of_keys_and_values():
    vanilla = 32 * 2 * 5 * 64 * 2
    assert kv_bytes_per_token(config_360m()) == vanilla
    assert kv_bytes_per_token(config_360m(), bytes_per_number=4) == 2 * vanilla
    expert = {"num_recursions": 3, "routing": "expert_choice"}
    assert kv_bytes_per_token(config_360m(**expert)) == pytest.approx(vanilla * (2 + 30 * 2 / 3) / 32)
    assert kv_bytes_per_token(config_360m(**expert), (1.0, 0.5, 0.1)) == pytest.approx(vanilla * (2 + 10 * 1.6) / 32)
    assert kv_bytes_per_token(config_360m(**expert, kv_mode="sharing")) == pytest.approx(vanilla * 12 / 32)
    assert kv_bytes_per_token(config_360m(num_recursions=3)) == vanilla


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab-size"):
        count_parameters(Config())
