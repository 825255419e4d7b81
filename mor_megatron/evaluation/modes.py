"""The modes in which a model can process a text, and which of them are causal."""

from __future__ import annotations

from dataclasses import dataclass, field

from mor_megatron.huggingface.configuration_mor import MoRConfig

TOPK, THRESHOLD = "topk", "threshold"


@dataclass(frozen=True)
class Mode:
    """One rule for the depths of tokens; a column of the table."""

    name: str
    causal: bool
    """Whether predictions depend on earlier tokens only; generation needs this."""
    options: dict = field(default_factory=dict)
    """Arguments of `MoRForCausalLM.forward`."""


def modes_of(config: MoRConfig, fixed_depths: bool = True) -> tuple[Mode, ...]:
    """All modes of a model.

    Args:
        config: the model's configuration.
        fixed_depths: whether to include the modes in which all tokens take depth 1, 2, .. Nr.
    """
    method = config.routing_method
    if method.looks_ahead:
        modes = [Mode(TOPK, False, {"selection": "capacity"}), Mode(THRESHOLD, True)]
    else:
        modes = [Mode("routed" if method.routes else "full depth", True)]
    deepest = config.num_recursions - (not method.routes)  # without a router, `full depth` is the deepest
    if fixed_depths:
        modes += [Mode(f"depth {depth}", True, {"depth": depth}) for depth in range(1, deepest + 1)]
    return tuple(modes)
