"""Routing options of one forward pass, and what it reports.

A `RoutingContext` lives for one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mor_megatron.recursion.losses import attach_loss

Selection = Literal["capacity", "threshold"]

Z_LOSS = "z_loss"
"""Router z-loss, before its coefficient."""
MEAN_DEPTH = "mean_depth"
"""Recursions a token passes, mean over tokens."""
TOKENS_PER_RECURSION = "tokens_per_recursion_{}"
"""Fraction of tokens active at a recursion."""


@dataclass
class RoutingContext:
    """Options of, and report from, one forward pass.

    Raises:
        ValueError: fixed_depth below 1.
    """

    iteration: int = 1
    """Number of the iteration being run, counted from 1; drives warm-ups in training."""
    selection: Selection = "capacity"
    """How a method that compares tokens selects: by capacity (looks ahead), or by a causal threshold."""
    threshold: float = 0.5
    """Selection by threshold: a token goes on if the sigmoid of its logit is at least this."""
    fixed_depth: int | None = None
    """Run every token to this many recursions, 1..Nr; None lets the router decide."""
    tokens: Tensor | None = None
    """Ids of all tokens, shaped like the residual stream without its width; None where the model was given none."""
    losses: Literal["attach", "sum", "none"] = "attach"
    """Router losses join the graph where they arise, are summed in `loss`, or are ignored."""
    router_loss_scale: float = 1.0
    """Factor on attached router losses: 1 / number of micro-batches makes them a mean over the global batch."""
    loss_scale: float = 1.0
    """Factor on every loss of the backward pass (fp16); attached router losses have it."""
    loss: Tensor | None = None
    """Report: the sum of router losses times their coefficients."""
    metrics: dict[str, Tensor] | None = field(default_factory=dict)
    """Report: 0-d fp32 detached means over this micro-batch; None: no report is wanted."""
    trace: dict[str, Tensor] | None = None
    """Set to {} to receive router logits, selections and depths (tests, analysis)."""
    on_decision: Callable[[str, Tensor], None] | None = None
    """Called with the name of each routing decision (a mask or depths, [S, B]) before it takes effect."""

    def __post_init__(self):
        if self.fixed_depth is not None and self.fixed_depth < 1:
            raise ValueError(f"fixed_depth={self.fixed_depth} must be between 1 and num-recursions")

    @property
    def threshold_logit(self) -> float:
        """The logit whose sigmoid is the threshold."""
        if self.threshold in (0.0, 1.0):
            return math.copysign(math.inf, self.threshold - 0.5)
        return math.log(self.threshold / (1.0 - self.threshold))

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

    def add_loss(self, rows: Tensor, loss: Tensor, coefficient: float, per_microbatch: bool = False) -> Tensor:
        """Count a router loss, in the way that `losses` says.

        Args:
            rows: hidden state that the pass goes on with, any shape.
            loss: scalar, before its coefficient.
            coefficient: factor of the loss.
            per_microbatch: attached losses are summed over micro-batches instead of averaged.
        Returns:
            `rows`; a loss that is attached enters the graph through them.
        """
        if self.losses == "none":
            return rows
        if self.losses == "sum":
            if coefficient > 0.0:
                self.loss = coefficient * loss if self.loss is None else self.loss + coefficient * loss
            return rows
        return attach_loss(
            rows, loss, coefficient * self.loss_scale * (1.0 if per_microbatch else self.router_loss_scale)
        )

    def report(self, name: str, value: Tensor) -> None:
        """Record a metric of this micro-batch; values of one name, such as one a recursion, are summed."""
        if self.metrics is None:
            return
        value = value.detach().float()
        self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def report_fraction(self, name: str, fraction: float, device: torch.device) -> None:
        """Record a metric whose value is known on the host."""
        if self.metrics is not None:
            self.report(name, torch.full((), fraction, device=device))

    def record(self, name: str, value: Tensor) -> None:
        """Record a tensor for analysis if a trace was asked for."""
        if self.trace is not None:
            self.trace[name] = value.detach()

    def decide(self, name: str, decision: Callable[[], Tensor]) -> None:
        """Record a routing decision and pass it to `on_decision`; it is computed only if one of them is wanted."""
        if self.trace is None and self.on_decision is None:
            return
        value = decision()
        self.record(name, value)
        if self.on_decision is not None:
            self.on_decision(name, value)
