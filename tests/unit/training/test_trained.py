"""What `--freeze` leaves to train, and the group of adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import small_config

from mor_megatron.checkpointing.compatibility import differences
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.planning.memory import trained_parameters
from mor_megatron.recursion.setting import Change
from mor_megatron.training.optimizer import parameter_groups
from mor_megatron.training.trained import choose_trained

pytestmark = pytest.mark.usefixtures("process_group")


def prepared(name: str, **optimizer) -> MoRModel:
    config = small_config(name)
    config = replace(config, optimizer=replace(config.optimizer, **optimizer))
    model = MoRModel(config)
    choose_trained(model, config)
    return model


def kinds(model: MoRModel) -> set[str]:
    """Of the weights that are trained."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    words = ("router.", ".adapters.", "recursion_embedding.", "layernorm.")
    return {next((word for word in words if word in name), name) for name in names}


def test_freeze():
    assert kinds(prepared("expert_relaxed", freeze="all-but-routers")) == {"router."}
    base = prepared("expert_relaxed", freeze="base")
    assert kinds(base) == {"router.", ".adapters.", "recursion_embedding.", "layernorm."}
    assert not any(weight.requires_grad for weight in base.layers["0"].parameters())
    assert not base.final_layernorm.weight.requires_grad
    assert not [name for name, weight in prepared("expert_relaxed").named_parameters() if not weight.requires_grad]


def test_what_was_frozen_has_no_state_to_go_on_from():
    frozen = prepared("expert_relaxed", freeze="base").run_config
    (found,) = differences(frozen, replace(frozen, optimizer=replace(frozen.optimizer, freeze="none")))
    assert (found.name, found.change) == ("freeze", Change.STATE)


@pytest.mark.parametrize("freeze", ["none", "base", "all-but-routers"])
def test_memory_counts_what_is_trained(freeze):
    model = prepared("expert_relaxed", freeze=freeze)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == trained_parameters(model.run_config, model.pipeline, 0)


def test_adapters_are_a_group():
    model = prepared("recursive_relaxed", lora_lr_mult=4.0, lora_weight_decay=0.01)
    names = {weight: name for name, weight in model.named_parameters()}
    (group,) = (group for group in parameter_groups(model, 0.1) if group["lr_mult"] == 4.0)
    adapters = {name for name in names.values() if ".adapters." in name}
    assert {names[weight] for weight in group["params"]} == adapters
    assert group["weight_decay"] == 0.01
    assert all(group["weight_decay"] in (0.0, 0.1) for group in parameter_groups(model, 0.1) if group["lr_mult"] == 1.0)
