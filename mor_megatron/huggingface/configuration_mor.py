"""Configuration of a Mixture-of-Recursions model (arXiv 2507.10524), and the plan that follows from it.

This file travels with an exported model, as does what it imports; torch and transformers are all that they need.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import transformers

from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.plan import KV_MODES, RecursionPlan, build_plan
from mor_megatron.recursion.relaxation import RelaxationSettings, resolve_relaxation
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import check, rule_of

from .extensions_mor import NAMES  # noqa: F401 (what it imports registers itself)
from .versions_mor import CACHE  # noqa: F401 (it asks for a version of transformers that has the names used here)

AUTO_MAP = {
    "AutoConfig": "configuration_mor.MoRConfig",
    "AutoModel": "modeling_mor.MoRModel",
    "AutoModelForCausalLM": "modeling_mor.MoRForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mor.MoRForSequenceClassification",
}


def exported_name(name: str) -> str:
    """A routing method's setting as transformers would call it: coefficients are `coef` there."""
    return name.removesuffix("f") if name.endswith("_coeff") else name


class MoRConfig(transformers.PreTrainedConfig):
    """A MoR model; `num_recursions=1` with routing none is a Llama.

    Raises:
        ValueError: a setting is unknown, or settings do not fit each other.
    """

    model_type = "mor"
    keys_to_ignore_at_inference = ["cache", "depths", "router_loss"]  # noqa: RUF012 (the Trainer adds to it as a list)

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    """Unrolled depth: positions that a token of full depth passes."""
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling_factor: float | None = None
    """Factor of Llama 3's scaled rotary embedding; None: no scaling."""
    qkv_bias: bool = False
    """Whether query, key and value projections have a bias, as in Qwen2."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    padding_row: int | None = None
    """Id that the export added to the vocabulary for padding: it is never predicted. None: it added none."""

    num_recursions: int = 1
    sharing_strategy: str = "middle_cycle"
    kv_mode: str = "caching"
    """caching: a recursion has keys and values of its own tokens; sharing: those of recursion 0 for all;
    sharing_update: those of recursion 0 with the active tokens' own in their places."""
    routing: str = "none"
    """expert_choice: a recursion keeps tokens; token_choice: a token picks its depth."""
    depth: int | None = None
    """Recursions of every token; None lets the router decide. A call can say otherwise."""
    router_threshold: float = 0.5
    """expert_choice: a token goes on if the sigmoid of its logit is at least this. A call can say otherwise."""

    router_losses: bool = True
    """Add the router's losses, times the coefficients below, to the loss in training mode."""

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_mode not in KV_MODES:
            raise ValueError(f"kv_mode={self.kv_mode} is unknown: use one of {', '.join(KV_MODES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        try:
            self._resolve_routing(kwargs)
            self._resolve_relaxation(kwargs)
        except ValueError as error:
            raise ValueError(_in_our_words(str(error))) from None
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @property
    def plan(self) -> RecursionPlan:
        """Derived, never stored."""
        capacities = self.routing_method.capacities(self.routing_settings, self.num_recursions)
        return build_plan(self.num_hidden_layers, self.num_recursions, self.sharing_strategy, self.kv_mode, capacities)

    @property
    def routing_method(self) -> type[RoutingMethod]:
        """The class of the routing method."""
        return method_of(self.routing)

    @property
    def routing_settings(self) -> Any:
        """The routing method's settings; this configuration has them as attributes (`exported_name`)."""
        values = {}
        for entry in fields(self.routing_method.Settings):
            value = getattr(self, exported_name(entry.name), entry.default)
            values[entry.name] = tuple(value) if isinstance(value, list) else value
        return self.routing_method.Settings(**values)

    @property
    def relaxation_settings(self) -> RelaxationSettings:
        """How recursions differ; this configuration has them as attributes where they do."""
        own = fields(RelaxationSettings)
        return RelaxationSettings(**{entry.name: getattr(self, entry.name, entry.default) for entry in own})

    def _resolve_relaxation(self, kwargs: dict[str, Any]) -> None:
        """Check how recursions differ; keep the settings as attributes if they do."""
        given = {entry.name: kwargs.pop(entry.name, entry.default) for entry in fields(RelaxationSettings)}
        settings = RelaxationSettings(**given)
        check(settings)
        settings = resolve_relaxation(settings, self.plan)
        for entry in fields(settings) if settings.is_relaxed else ():
            _, is_read = rule_of(entry).read_with or ("", lambda _: True)
            if is_read(settings):
                setattr(self, entry.name, getattr(settings, entry.name))

    def _resolve_routing(self, kwargs: dict[str, Any]) -> None:
        """Check how deep tokens go; keep the routing method's settings as attributes, defaults filled in."""
        method = self.routing_method
        own = [entry for entry in fields(method.Settings) if rule_of(entry).in_export]
        for entry in own:
            name = exported_name(entry.name)
            if hasattr(MoRConfig, name):
                raise ValueError(
                    f"routing={self.routing} defines the setting {name}, which exists: give it another name"
                )
            setattr(self, name, kwargs.pop(name, entry.default))
        check(self.routing_settings)
        settings = method.resolve(self.routing_settings, self.num_recursions)
        for entry in own:
            value = getattr(settings, entry.name)
            setattr(self, exported_name(entry.name), list(value) if isinstance(value, tuple) else value)
        if method.routes and (self.num_recursions == 1 or not self.plan.is_cyclic):
            raise ValueError(f"routing={self.routing} needs num_recursions above 1 and cycle or middle_cycle sharing")
        self.plan  # noqa: B018 (raises if depth and recursions do not fit)


def _in_our_words(message: str) -> str:
    """Rewrite a message about a run's settings with the names used here: num-layers=8 becomes num_hidden_layers=8."""
    message = message.replace("num-layers=", "num_hidden_layers=").replace(", or --depth-rounding down or up", "")
    return re.sub(r"\b[a-z]+(-[a-z]+)+(?==)", lambda name: exported_name(name[0].replace("-", "_")), message)


__all__ = ["MoRConfig"]
