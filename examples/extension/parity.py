"""An extension: tokens whose id is a multiple of a number go deep, the others pass one recursion.

With the sharing strategy `late_cycle`, which leaves the first layer unique and repeats the rest.
"""

from dataclasses import dataclass, replace

from mor_megatron.recursion.methods import routing_method
from mor_megatron.recursion.plan import cycle, sharing_strategy
from mor_megatron.recursion.routers import Router, RouterSettings, resolve_router, score
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import setting


@sharing_strategy
def late_cycle(depth, num_recursions):
    """A unique first layer, then the block again and again."""
    if num_recursions == 1:
        return cycle(depth, 1)
    shared = cycle(depth - 1, num_recursions)
    return shared and [(0, None), *((1 + slot, r) for slot, r in shared)]


@dataclass(frozen=True)
class ParitySettings(RouterSettings):
    """Settings of parity routing."""

    parity_period: int = setting(2, least=1)
    """parity: tokens whose id is a multiple of this go deep."""


@routing_method
class Parity(RoutingMethod):
    """One trained gate weighs what every recursion adds."""

    name = "parity"
    about = "parity routing: a token's id says whether it goes deep"
    Settings = ParitySettings
    weighs = True

    @classmethod
    def resolve(cls, settings, num_recursions):
        if settings.parity_period == 1:
            raise ValueError("parity-period=1 sends every token deep: use 2 or more, or --routing none")
        return replace(settings, **resolve_router(settings, ("sigmoid", "tanh"), cls.name))

    def planned_fractions(self):
        return (1.0, *[1.0 / self.settings.parity_period] * (self.plan.num_recursions - 1))

    def flops_per_token(self, parameters, fractions):
        return 2.0 * parameters * sum(fractions)

    def build(self, hidden_size, dtype):
        self.gate = Router(self.settings, hidden_size, 1, dtype)

    def open(self, r, stream, context):
        layout, active = self.layout, stream.tokens
        if r > 0 and context.fixed_depth is None:
            active, _ = layout.keep(active, context.tokens % self.settings.parity_period == 0)
        rows = layout.gather(stream.hidden, active)
        gate = score(layout.collect(self.gate(rows), active), self.settings)
        return replace(stream, active=active, rows=rows, gate=gate)
