"""Which settings may differ between a checkpoint and the run that loads it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from mor_megatron.checkpointing.compatibility import differences, model_shape, refuse, require_same_parameters
from mor_megatron.checkpointing.shards import Sharding
from mor_megatron.config.schema import (
    Change,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RecursionConfig,
    setting_types,
)
from mor_megatron.config.unread import is_read
from mor_megatron.config.validate import validate
from mor_megatron.recursion.setting import rule_of

HERE = Path("iter_1")
BASE = Config(
    model=ModelConfig(num_layers=8, hidden_size=64, vocab_size=64),
    recursion=RecursionConfig(num_recursions=3, routing="expert_choice"),
    data=DataConfig(data_path=("a",), tokenizer_type="NullTokenizer", tokenizer_model="63", seq_length=64),
    optimizer=OptimizerConfig(lr=3e-3),
)
OF_THE_FUNCTION = {
    "norm_epsilon": 1e-6,
    "rotary_base": 5e5,
    "use_rope_scaling": True,
    "kv_mode": "sharing",
    "capacity": (1.0, 0.5, 0.25),
    "router_type": "mlp",
    "router_func": "tanh",
    "router_alpha": 0.5,
    "router_temperature": 2.0,
    "router_gating": "additive",
    "router_objective": "aux_router",
    "relaxation": "lora",
    "recursion_embedding": True,
}
OF_THE_WEIGHTS = {
    "hidden_size": 128,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "kv_channels": 8,
    "untie_embeddings_and_output_weights": True,
    "add_qkv_bias": True,
    "recursion_norms": True,
}
OF_ADAPTERS = {"lora_rank": 8, "lora_targets": "mlp", "lora_recursions": "all_but_first"}
REPORTED = {
    "lr": (1e-3, "lr was 0.003, is now 0.001"),
    "data_path": (("0.3", "a", "0.7", "b"), "data-path was a, is now 0.3 a 0.7 b"),
    "split": ("9,1,0", "split was 969,30,1, is now 9,1,0"),
    "seed": (7, "seed was 1234, is now 7"),
    "seq_length": (32, "seq-length was 64, is now 32"),
    "tokenizer_model": ("62", "tokenizer-model was 63, is now 62"),
    "router_aux_loss_coeff": (0.01, "router-aux-loss-coeff was 0.001, is now 0.01"),
    "bf16": (True, "bf16 was False, is now True"),
}
NO_MATTER = {"log_interval": 3, "save": "b", "num_workers": 2, "eval_interval": 7, "keep_last": 1, "async_save": True}


def changed(config: Config = BASE, **values) -> Config:
    for name, value in values.items():
        section, _ = setting_types()[name]
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return validate(config)


def found(wanted: Config, saved: Config = BASE) -> list:
    return differences(validate(saved), wanted)


@pytest.mark.parametrize("name", [*OF_THE_FUNCTION, *OF_THE_WEIGHTS])
def test_another_function_is_for_fine_tuning_and_other_weights_are_for_nobody(name: str) -> None:
    value = {**OF_THE_FUNCTION, **OF_THE_WEIGHTS}[name]
    wanted = changed(**{name: value})
    flag = name.replace("_", "-")
    message = f"{flag}=.* does not fit iter_1, written with {flag}=.*: give the model the same settings.* or leave out"
    with pytest.raises(ValueError, match=message):
        refuse(HERE, found(wanted), set())
    if name in OF_THE_FUNCTION:
        refuse(HERE, found(wanted), {Change.FUNCTION})
    else:
        with pytest.raises(ValueError, match=message):
            refuse(HERE, found(wanted), {Change.FUNCTION, Change.STATE})


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_other_adapters_are_other_weights(name: str) -> None:
    saved = changed(relaxation="lora", lora_alpha=64.0)
    wanted = changed(saved, **{name: OF_ADAPTERS[name]})
    with pytest.raises(ValueError, match=f"{name.replace('_', '-')}=.*: give the model the same settings"):
        refuse(HERE, found(wanted, saved), {Change.FUNCTION, Change.STATE})
    refuse(HERE, found(changed(saved, lora_alpha=1.0), saved), {Change.FUNCTION})


def test_fine_tuning_may_add_adapters_and_drops_none() -> None:
    plain = {"layers.1.mlp.linear_fc2.weight": Sharding((4, 6), 1)}
    relaxed = plain | {"layers.1.mlp.linear_fc2.adapters.down_a": Sharding((3, 2, 6), 2)}
    require_same_parameters(HERE, plain, relaxed, finetune=True)
    for saved, wanted, finetune in ((plain, relaxed, False), (relaxed, plain, True)):
        with pytest.raises(ValueError, match="down_a is "):
            require_same_parameters(HERE, saved, wanted, finetune)


@pytest.mark.parametrize("name", REPORTED)
def test_what_trains_on_otherwise_is_told(name: str) -> None:
    value, told = REPORTED[name]
    differ = found(changed(**{name: value}))
    assert told in [str(each) for each in differ]
    refuse(HERE, differ, set())


def test_the_optimizer_may_be_another_where_its_state_is_not_loaded() -> None:
    differ = found(changed(optimizer="sgd"))
    with pytest.raises(ValueError, match=r"optimizer=sgd does not fit .*--finetune.*--no-load-optim"):
        refuse(HERE, differ, set())
    refuse(HERE, differ, {Change.STATE})


def test_what_does_not_matter_is_not_told() -> None:
    assert found(changed(**NO_MATTER)) == []


def test_only_settings_that_are_read_count() -> None:
    vanilla = Config(model=BASE.model)
    assert found(changed(vanilla, router_temperature=2.0), vanilla) == []
    every_head = {"group_query_attention": True, "num_query_groups": 4}
    assert found(changed(**every_head)) == [], "each head has keys and values of its own either way"
    assert [each.name for each in found(changed(group_query_attention=True, num_query_groups=2))] == [
        "group-query-attention"
    ]


def test_a_new_field_of_the_model_decides_its_function_unless_it_says_otherwise() -> None:
    shape = model_shape(validate(BASE))
    assert shape["vocab-size"] == 64
    for section in ("model", "recursion"):
        for entry in fields(getattr(BASE, section)):
            if rule_of(entry).change is None and is_read(BASE, section, entry):
                assert entry.name.replace("_", "-") in shape
    assert "lr" not in shape


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab-size=65 does not fit iter_1, written with vocab-size=64"):
        refuse(HERE, differences(validate(BASE), changed(vocab_size=65)), {Change.FUNCTION})


def test_corpora_that_have_moved_to_another_flag_are_told() -> None:
    wanted = changed(data_path=(), train_data_path=("a",), valid_data_path=("b",))
    assert "data-path was a, is now None" in [str(difference) for difference in found(wanted)]
