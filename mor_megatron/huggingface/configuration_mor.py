"""Configuration of a Mixture-of-Recursions model (arXiv 2507.10524), and the plan that follows from it.

This file travels with an exported model: it needs torch and transformers and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import transformers

from .versions_mor import CACHE  # noqa: F401 (it asks for a version of transformers that has the names used here)

STRATEGIES = ("cycle", "sequence", "middle_cycle", "middle_sequence")
KV_MODES = ("caching", "sharing", "sharing_update")
CHOICES = {
    "sharing_strategy": STRATEGIES,
    "kv_mode": KV_MODES,
    "routing": ("none", "expert_choice", "token_choice"),
    "router_type": ("linear", "mlp"),
    "router_func": ("sigmoid", "tanh", "softmax", "none"),
    "router_gating": ("weighted", "additive"),
    "router_objective": ("aux_loss", "aux_router"),
    "router_balance": ("loss", "loss_free", "none"),
    "router_balance_scope": ("sequence", "microbatch"),
}
AUTO_MAP = {
    "AutoConfig": "configuration_mor.MoRConfig",
    "AutoModel": "modeling_mor.MoRModel",
    "AutoModelForCausalLM": "modeling_mor.MoRForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mor.MoRForSequenceClassification",
}


@dataclass(frozen=True)
class LayerUse:
    """One position of the unrolled network."""

    index: int
    """Position in the order of execution."""
    physical: int
    """Stored layer that runs here."""
    recursion: int | None
    """Recursion it belongs to; None for the layers that run once, first and last."""
    kv_source: int
    """Position whose keys and values are attended to."""


@dataclass(frozen=True)
class MoRPlan:
    """The unrolled network: which stored layer runs when, and whose keys and values it reads."""

    num_recursions: int
    layers: tuple[LayerUse, ...]

    @classmethod
    def build(cls, num_layers: int, num_recursions: int, strategy: str, kv_mode: str) -> MoRPlan:
        """Lay out `num_layers` positions; cycle repeats the block, sequence each layer; middle_* keeps the ends apart.

        Raises:
            ValueError: num_recursions does not divide what is shared.
        """
        lead = 1 if strategy.startswith("middle") and num_recursions > 1 else 0
        block, rest = divmod(num_layers - 2 * lead, num_recursions)
        if block < 1 or rest:
            raise ValueError(
                f"num_hidden_layers={num_layers} does not fit num_recursions={num_recursions} with "
                f"sharing_strategy={strategy}: use {2 * lead} plus a multiple of {num_recursions}"
            )
        layers = [LayerUse(0, 0, None, 0)] if lead else []
        for position in range(block * num_recursions):
            if strategy.endswith("cycle"):
                recursion, slot = divmod(position, block)
                source = slot
            else:
                slot, recursion = divmod(position, num_recursions)
                source = slot * num_recursions
            index = lead + position
            layers.append(LayerUse(index, lead + slot, recursion, index if kv_mode == "caching" else lead + source))
        if lead:
            layers.append(LayerUse(num_layers - 1, lead + block, None, num_layers - 1))
        return cls(num_recursions, tuple(layers))

    @property
    def num_physical_layers(self) -> int:
        """Stored layers."""
        return 1 + max(layer.physical for layer in self.layers)

    @cached_property
    def first(self) -> tuple[LayerUse, ...]:
        """The layer before the shared ones, if there is one."""
        return tuple(layer for layer in self.layers[:1] if layer.recursion is None)

    @cached_property
    def last(self) -> tuple[LayerUse, ...]:
        """The layer after the shared ones, if there is one."""
        return tuple(layer for layer in self.layers[-1:] if layer.recursion is None)

    def pass_layers(self, recursion: int) -> tuple[LayerUse, ...]:
        """Uses of one recursion, in the order of execution."""
        return self._passes[recursion]

    @cached_property
    def _passes(self) -> tuple[tuple[LayerUse, ...], ...]:
        return tuple(tuple(x for x in self.layers if x.recursion == r) for r in range(self.num_recursions))

    def shared(self, depth: int) -> tuple[LayerUse, ...]:
        """Uses of the first `depth` recursions, in the order of execution."""
        return tuple(layer for layer in self.layers if layer.recursion is not None and layer.recursion < depth)


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
    """Of Llama 3's scaled rotary embedding; None: not scaled."""
    qkv_bias: bool = False
    """Whether query, key and value projections have a bias, as Qwen2's."""
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
    capacity: list[float] | None = None
    """expert_choice: fraction of tokens at each recursion in training; default (Nr-r)/Nr."""
    router_type: str = "linear"
    router_func: str | None = None
    router_alpha: float | None = None
    router_temperature: float = 1.0
    router_gating: str = "weighted"
    router_objective: str = "aux_loss"
    """aux_router: a second router of each recursion decides by threshold; the first one gives the gate."""
    router_balance: str = "loss"
    router_balance_scope: str = "sequence"

    depth: int | None = None
    """Recursions of every token; None lets the router decide. A call can say otherwise."""
    router_threshold: float = 0.5
    """expert_choice: a token goes on if the sigmoid of its logit is at least this. A call can say otherwise."""

    router_losses: bool = True
    """Add the router's losses, times the coefficients below, to the loss in training mode."""
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    router_balance_coef: float = 0.1

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.router_func is None:
            self.router_func = "softmax" if self.routing == "token_choice" else "sigmoid"
        if self.router_alpha is None:
            self.router_alpha = 1.0 if self.router_func == "softmax" else 0.1
        if self.routing == "expert_choice" and self.capacity is None:
            self.capacity = [(self.num_recursions - r) / self.num_recursions for r in range(self.num_recursions)]
        self._check()
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @property
    def plan(self) -> MoRPlan:
        """Derived, never stored."""
        return MoRPlan.build(self.num_hidden_layers, self.num_recursions, self.sharing_strategy, self.kv_mode)

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} is unknown: use one of {', '.join(choices)}")
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.routing != "none" and (self.num_recursions == 1 or not self.sharing_strategy.endswith("cycle")):
            raise ValueError(f"routing={self.routing} needs num_recursions above 1 and cycle or middle_cycle sharing")
        if self.routing == "expert_choice" and (len(self.capacity) != self.num_recursions or self.capacity[0] != 1.0):
            raise ValueError(f"capacity={self.capacity} must have num_recursions={self.num_recursions} values, first 1")
        self.plan  # noqa: B018 (raises if depth and recursions do not fit)


MoRConfig.register_for_auto_class()

__all__ = ["LayerUse", "MoRConfig", "MoRPlan"]
