"""What an export says and counts of recursions that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import RELAXED
from pairs import pair

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import training_config
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.planning.accounting import count_parameters
from mor_megatron.recursion.relaxation import RelaxationSettings

pytestmark = pytest.mark.usefixtures("process_group")

WORDS = set(RelaxationSettings.__dataclass_fields__)


def test_the_configuration_says_nothing_of_what_a_model_has_not(tmp_path: Path):
    pair("recursive")[1].config.save_pretrained(tmp_path)
    assert not WORDS & json.loads((tmp_path / "config.json").read_text()).keys()
    pair("sequence_relaxed")[1].config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in WORDS} == {
        "relaxation": "lora", "lora_rank": 3, "lora_alpha": 6.0, "lora_targets": "all", "lora_recursions": "all",
        "recursion_norms": True, "recursion_embedding": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", RELAXED)
def test_settings_come_back(name: str, tmp_path: Path):
    model, export = pair(name)
    export.config.save_pretrained(tmp_path)
    recursion = training_config(MoRConfig.from_pretrained(tmp_path)).recursion
    assert {word: getattr(recursion, word) for word in WORDS} == {
        word: getattr(model.run_config.recursion, word) for word in WORDS
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relaxation": "lora"}, "relaxation=lora tells recursions apart"),
        ({"relaxation": "dora", "num_recursions": 3}, "relaxation=dora is unknown"),
        ({"relaxation": "lora", "lora_rank": 0, "num_recursions": 3}, "lora_rank=0 is out of range"),
        ({"recursion_embedding": True, "num_recursions": 3, "sharing_strategy": "middle_sequence"}, "recursion_emb"),
    ],
    ids=str,
)
def test_settings_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoRConfig(**settings)


def test_new_weights_change_nothing_at_first():
    """Of a model that is made, not loaded: adapters and vectors that add nothing, norms of one."""
    config = pair("expert_relaxed")[1].config
    torch.manual_seed(0)
    named = dict(MoRForCausalLM(config).named_parameters())
    assert not any(
        weight.any() for name, weight in named.items() if name.endswith(("_b", "recursion_embedding.weight"))
    )
    assert all((weight == 1).all() for name, weight in named.items() if "norm" in name)
    assert all(weight.std() > 0 for name, weight in named.items() if name.endswith("_a"))


@pytest.mark.parametrize("name", RELAXED)
def test_parameters_are_counted(name: str):
    model, export = pair(name)
    assert count_parameters(model.run_config).unique == sum(weight.numel() for weight in export.parameters())
