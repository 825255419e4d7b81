"""What one forward pass is told about routing, and what it reports back.

A `RoutingContext` lives for one micro-batch. The names of all router metrics are here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mor_megatron.config.schema import RecursionConfig

if TYPE_CHECKING:  # programs that only count must not wait for torch
    from torch import Tensor

Selection = Literal["capacity", "threshold"]

AUX_LOSS = "aux_loss"
"""expert_choice: binary cross entropy towards the selection, summed over recursions."""
SELECTION_ACCURACY = "selection_accuracy"
"""expert_choice: how often the causal threshold agrees with the selection, mean over recursions."""
BALANCE_LOSS = "balance_loss"
"""token_choice: balancing loss, 1 at uniform depths."""
Z_LOSS = "z_loss"
"""Router z-loss, before its coefficient."""
MEAN_DEPTH = "mean_depth"
"""Recursions a token passes, mean over tokens."""
TOKENS_PER_RECURSION = "tokens_per_recursion_{}"
"""Fraction of tokens active at a recursion."""
DEPTH_FRACTION = "depth_fraction_{}"
"""token_choice: fraction of tokens that leave after exactly this recursion (0-based)."""


def routing_metrics(recursion: RecursionConfig) -> tuple[str, ...]:
    """Names of what a training pass reports, in the order of the log line; the same on every rank of a pipeline."""
    if recursion.routing == "none":
        return ()
    names = []
    if recursion.routing == "expert_choice":
        names += [AUX_LOSS, SELECTION_ACCURACY]
    elif recursion.router_balance == "loss":
        names.append(BALANCE_LOSS)
    if recursion.router_z_loss_coeff > 0.0:
        names.append(Z_LOSS)
    per_recursion = [TOKENS_PER_RECURSION] + ([DEPTH_FRACTION] if recursion.routing == "token_choice" else [])
    names += [name.format(r) for name in per_recursion for r in range(recursion.num_recursions)]
    return (*names, MEAN_DEPTH)


@dataclass
class RoutingContext:
    """Orders for, and report of, one forward pass.

    Raises:
        ValueError: fixed_depth below 1.
    """

    iteration: int = 1
    """Number of the iteration being run, counted from 1; drives capacity and balancing warm-up in training."""
    selection: Selection = "capacity"
    """expert_choice: whole-sequence top-k (not causal), or the causal threshold (sigmoid >= 0.5)."""
    fixed_depth: int | None = None
    """Run every token to this many recursions, 1..Nr; None lets the router decide."""
    router_loss_scale: float = 1.0
    """Factor on router losses in the graph: 1 / number of micro-batches makes them a mean over the global batch."""
    loss_scale: float = 1.0
    """Factor on every loss of the backward pass (fp16); router losses join the graph with it."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Report: 0-d fp32 detached means over this micro-batch."""
    trace: dict[str, Tensor] | None = None
    """Set to {} to receive router logits, selections and depths (tests, analysis)."""

    on_decision: Callable[[str, Tensor], None] | None = None
    """Called with the name of each routing decision (a mask or depths, [S, B]) before anything is done by it."""

    def __post_init__(self):
        if self.fixed_depth is not None and self.fixed_depth < 1:
            raise ValueError(f"fixed_depth={self.fixed_depth} must be between 1 and num-recursions")

    def loss_factor(self, coefficient: float, per_microbatch: bool = False) -> float:
        """What a router loss is multiplied by where it joins the graph.

        Args:
            coefficient: of the loss.
            per_microbatch: sum it over micro-batches instead of averaging.
        """
        return coefficient * self.loss_scale * (1.0 if per_microbatch else self.router_loss_scale)

    def depth(self, num_recursions: int) -> int:
        """Recursions to run: all, or the fixed depth.

        Raises:
            ValueError: fixed_depth exceeds num_recursions.
        """
        if self.fixed_depth is None:
            return num_recursions
        if self.fixed_depth > num_recursions:
            raise ValueError(f"fixed_depth={self.fixed_depth} exceeds num-recursions={num_recursions}")
        return self.fixed_depth

    def report(self, name: str, value: Tensor) -> None:
        """Record one metric of this micro-batch; what is reported more than once (each recursion its part) adds up."""
        value = value.detach().float()
        self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def record(self, name: str, value: Tensor) -> None:
        """Record a tensor for analysis if a trace was asked for."""
        if self.trace is not None:
            self.trace[name] = value.detach()

    def decide(self, name: str, decision: Tensor) -> None:
        """Record a routing decision and let others look at it."""
        self.record(name, decision)
        if self.on_decision is not None:
            self.on_decision(name, decision)
