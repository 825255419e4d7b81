"""No routing: every token passes every recursion, with nothing added around it."""

from __future__ import annotations

from dataclasses import replace

from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.plan import VirtualLayer
from mor_megatron.recursion.routing import Incoming, NoSettings, RoutingMethod, Stream


class NoRouting(RoutingMethod):
    """A vanilla (Nr=1) or a recursive Transformer."""

    name = "none"
    about = "no routing: every token passes every recursion"
    routes = False
    weighs = False

    @classmethod
    def static_from(cls, settings: NoSettings) -> int:
        """All rows, always."""
        return 0

    def metric_names(self) -> tuple[str, ...]:
        """Nothing is decided, and so nothing is reported."""
        return ()

    def forward(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """`open`, whatever the depth: the rows go on to the last layers."""
        return self.open(r, stream, context)

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """The residual stream itself is worked on."""
        return replace(stream, hidden=None, rows=stream.hidden) if r == 0 else stream

    def close(self, r: int, stream: Stream) -> Stream:
        """Nothing comes back before the end."""
        return stream

    def passes(self, depth: int) -> tuple[tuple[VirtualLayer, ...], ...]:
        """One pass: recursions need not even be contiguous."""
        return (tuple(layer for layer in self.plan.shared if layer.recursion < depth),)

    def incoming(self, r, tokens, choice, context) -> Incoming:
        """All rows, and nothing else."""
        return Incoming(tokens.shape, decides=False)

    def receive(self, r, tokens, choice, decision, context):
        """All tokens are active."""
        return tokens, choice
