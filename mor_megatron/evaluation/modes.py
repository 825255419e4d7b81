"""The modes in which one model can be run over a text, and which of them are causal."""

from __future__ import annotations

from dataclasses import dataclass, field

from mor_megatron.huggingface.configuration_mor import MoRConfig

TOPK, THRESHOLD = "topk", "threshold"


@dataclass(frozen=True)
class Mode:
    """One way to decide how deep tokens go: a column of the table."""

    name: str
    causal: bool
    """Whether what is predicted at a position depends on nothing after it; only then can one generate like this."""
    options: dict = field(default_factory=dict)
    """Arguments of `MoRForCausalLM.forward`."""


def modes_of(config: MoRConfig, fixed_depths: bool = True) -> tuple[Mode, ...]:
    """All modes of a model.

    Args:
        config: of the model.
        fixed_depths: also every token at depth 1, 2, .. Nr.
    """
    method = config.routing_method
    if method.looks_ahead:
        modes = [Mode(TOPK, False, {"selection": "capacity"}), Mode(THRESHOLD, True)]
    else:
        modes = [Mode("routed" if method.routes else "full depth", True)]
    deepest = config.num_recursions - (not method.routes)  # without a router that column is there already
    if fixed_depths:
        modes += [Mode(f"depth {depth}", True, {"depth": depth}) for depth in range(1, deepest + 1)]
    return tuple(modes)
