"""The ways in which one model can be run over a text, and which of them are causal."""

from __future__ import annotations

from dataclasses import dataclass, field

from mor_megatron.huggingface.configuration_mor import MoRConfig

TOPK, THRESHOLD = "topk", "threshold"


@dataclass(frozen=True)
class Way:
    """One way to decide how deep tokens go: a column of the table."""

    name: str
    causal: bool
    """Whether what is predicted at a position depends on nothing after it; only then can one generate like this."""
    orders: dict = field(default_factory=dict)
    """Arguments of `MoRForCausalLM.forward`."""


def ways_of(config: MoRConfig, fixed_depths: bool = True) -> tuple[Way, ...]:
    """All ways to run a model.

    Args:
        config: of the model.
        fixed_depths: also every token at depth 1, 2, .. Nr.
    """
    if config.routing == "expert_choice":
        ways = [Way(TOPK, False, {"selection": "capacity"}), Way(THRESHOLD, True)]
    elif config.routing == "token_choice":
        ways = [Way("routed", True)]
    else:
        ways = [Way("full depth", True)]
    deepest = config.num_recursions - (config.routing == "none")  # without a router that column is there already
    if fixed_depths:
        ways += [Way(f"depth {depth}", True, {"depth": depth}) for depth in range(1, deepest + 1)]
    return tuple(ways)
