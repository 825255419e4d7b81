"""Settings of a run -> configuration of its export, and back."""

from __future__ import annotations

from dataclasses import fields

from mor_megatron.config import schema
from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig
from mor_megatron.config.validate import validate
from mor_megatron.huggingface.configuration_mor import MoRConfig, exported_name
from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.relaxation import RelaxationSettings
from mor_megatron.recursion.setting import Rule, rule_of

SHARING = ("num_recursions", "sharing_strategy", "kv_mode", "routing")
"""Settings of every recursive model, of one name and meaning in both; those of its routing method come on top."""
RELAXATION = tuple(entry.name for entry in fields(RelaxationSettings))
"""The same of relaxation, which an export names if it has any."""


def export_config(config: Config, **tokens: int | None) -> MoRConfig:
    """The exported model's configuration.

    Args:
        config: of the run, validated, its vocabulary resolved.
        tokens: bos_token_id, eos_token_id, pad_token_id, padding_row; the last is a row behind the vocabulary.
    """
    model, recursion = config.model, config.recursion
    settings = {name: getattr(recursion, name) for name in (*SHARING, *RELAXATION)}
    for name in _method_settings(recursion.routing):
        value = getattr(recursion, name)
        settings[exported_name(name)] = list(value) if isinstance(value, tuple) else value
    if recursion.num_recursions == 1:
        settings["sharing_strategy"] = "cycle"  # no layers are shared, so that no strategy applies
    return MoRConfig(
        vocab_size=model.vocab_size + (tokens.get("padding_row") is not None),
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.key_value_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rotary_base,
        rope_scaling_factor=model.rope_scaling_factor if model.use_rope_scaling else None,
        qkv_bias=model.add_qkv_bias,
        initializer_range=model.init_method_std,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        **settings,
        **tokens,
    )


def run_config(model: ModelConfig, recursion: RecursionConfig) -> Config:
    """Validated settings of a run with this model; everything else has its default, or what fits the model.

    Raises:
        ValueError: settings do not fit each other.
    """
    seq_length = min(DataConfig.seq_length, model.max_position_embeddings)
    return validate(Config(model=model, recursion=recursion, data=DataConfig(seq_length=seq_length)))


def rope_scaling(factor: float | None) -> dict[str, bool | float]:
    """Fields of `ModelConfig` for Llama 3's scaling by a factor; None: none."""
    return {} if factor is None else {"use_rope_scaling": True, "rope_scaling_factor": factor}


def ends_in_padding(exported: MoRConfig) -> bool:
    """Whether the vocabulary's last row is one that the export added, and training does without."""
    return exported.padding_row is not None and exported.padding_row == exported.vocab_size - 1


def training_config(exported: MoRConfig) -> Config:
    """Validated settings of a run that trains an exported model on.

    Raises:
        ValueError: settings do not fit each other.
    """
    heads, groups = exported.num_attention_heads, exported.num_key_value_heads
    model = ModelConfig(
        num_layers=exported.num_hidden_layers,
        hidden_size=exported.hidden_size,
        ffn_hidden_size=exported.intermediate_size,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else None,
        kv_channels=exported.head_dim,
        max_position_embeddings=exported.max_position_embeddings,
        norm_epsilon=exported.rms_norm_eps,
        rotary_base=exported.rope_theta,
        **rope_scaling(exported.rope_scaling_factor),
        add_qkv_bias=exported.qkv_bias,
        init_method_std=exported.initializer_range,
        untie_embeddings_and_output_weights=not exported.tie_word_embeddings,
        vocab_size=exported.vocab_size - int(ends_in_padding(exported)),
    )
    return run_config(model, _recursion(exported))


def _recursion(exported: MoRConfig) -> RecursionConfig:
    if exported.num_recursions == 1:
        return RecursionConfig()
    settings = {name: getattr(exported, name) for name in SHARING}
    settings |= {name: getattr(exported, name) for name in RELAXATION if hasattr(exported, name)}
    stored = exported.routing_settings
    for name, rule in _method_settings(exported.routing).items():
        if rule.read_with is None or rule.read_with[1](stored):  # a run reports a setting that would do nothing
            settings[name] = getattr(stored, name)
    return schema.RecursionConfig(**settings)  # the current one: an extension adds settings


def _method_settings(routing: str) -> dict[str, Rule]:
    """Names of the routing method's settings that an export has, and their rules."""
    rules = {entry.name: rule_of(entry) for entry in fields(method_of(routing).Settings)}
    return {name: rule for name, rule in rules.items() if rule.in_export}
