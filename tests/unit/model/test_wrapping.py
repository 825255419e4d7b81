"""Tied weights remain one storage and one optimizer entry after DeepSpeed has wrapped the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import small_config

from mor_megatron.config.validate import validate
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.accounting import count_parameters
from mor_megatron.training.engine import build_engine

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("name", ["vanilla", "recursive", "expert_sharing", "token_loss_free"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_wrapped_storages(name, bf16, zero_stage):
    config = small_config(name, make_vocab_size_divisible_by=1)
    config = validate(replace(config, training=replace(config.training, bf16=bf16, zero_stage=zero_stage)))
    engine = build_engine(build_model(config), config)
    expected = count_parameters(config).unique
    # ZeRO moves parameters into flat buffers, so storages are told apart by where a parameter starts.
    places = {p.data_ptr(): p.numel() for p in engine.module.parameters()}
    assert sum(places.values()) == expected
    # A bf16 balancing bias could not take steps of 0.001, and bf16 angles would blur positions.
    assert {buffer.dtype for buffer in engine.module.buffers()} == {torch.float32}
    optimized = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    wrapped = engine.deepspeed.optimizer
    padding = sum(getattr(wrapped, "group_paddings", None) or getattr(wrapped, "groups_padding", [0]))
    assert optimized - padding == expected
