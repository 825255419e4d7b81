"""An extension that uses what examples/extension/parity.py does not.

That is `looks_ahead` and the layout's `best`, a module of its own, a buffer, a loss, and two unique first layers.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from mor_megatron.recursion.methods import routing_method
from mor_megatron.recursion.plan import cycle, sharing_strategy
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import setting

LOSS = "salience_loss"


@sharing_strategy
def two_first_cycle(depth, num_recursions):
    """Two unique first layers and one unique last one."""
    shared = cycle(max(depth - 3, 0), num_recursions)
    layers = [(0, None), (1, None), *((2 + slot, r) for slot, r in shared)]
    return shared and [*layers, (2 + len({slot for slot, _ in shared}), None)]


@dataclass(frozen=True)
class SalienceSettings:
    """Settings of salience routing."""

    salience_kept: float = setting(0.5, above=0, most=1)
    """salience: fraction of the tokens that recursions after the first keep."""


class Scorer(nn.Module):
    """One number for each row; no linear layer, and parameters that are not called weight."""

    def __init__(self, hidden_size, dtype):
        super().__init__()
        self.inner = nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))
        self.out = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x):
        return (x * self.out).float() @ self.inner.float().t()


@routing_method
class Salience(RoutingMethod):
    """One scorer for every recursion."""

    name = "salience"
    about = "salience routing: the best of each sequence go deep"
    Settings = SalienceSettings
    looks_ahead = True
    weighs = True

    @classmethod
    def capacities(cls, settings, num_recursions):
        return (1.0, *[settings.salience_kept] * (num_recursions - 1))

    def metric_names(self):
        return (LOSS, *super().metric_names())

    def build(self, hidden_size, dtype):
        self.scorer = Scorer(hidden_size, dtype)
        self.register_buffer("steps", torch.zeros(1))

    def open(self, r, stream, context):
        layout, candidates = self.layout, stream.active
        x = layout.gather(stream.hidden, candidates)
        logits = layout.collect(self.scorer(x), candidates)
        loss = logits.square().mean()
        if self.training:
            context.report(LOSS, loss)
        x = context.add_loss(x, loss, 0.01)
        active, index = candidates, None
        if r > 0 and context.fixed_depth is None:
            scores = logits.detach().squeeze(-1)
            if context.selection == "capacity":
                active, index = layout.best(candidates, scores, self.plan.capacities[r])
            else:
                active, index = layout.keep(candidates, scores >= context.threshold_logit)
        gate = layout.at(torch.sigmoid(logits), index)
        return replace(stream, active=active, rows=layout.take(x, candidates, index), gate=gate)

    def after_step(self, metrics, iteration):
        self.steps += 1.0
