"""A micro-batch between the first and the last layer, and the loop that every routing method shares.

    for each recursion r:
        open    decide who is active, take their rows out of the residual stream
        block   the shared layers, on those rows
        close   bring the rows back

The steps are apart because in a pipeline they happen on different ranks, at different times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows

Block = Callable[[int, Tensor, ActiveTokens], Tensor]
"""block(recursion, rows, active) -> rows: one pass of the shared layers over the active tokens."""


@dataclass(frozen=True)
class Stream:
    """State of a micro-batch among the recursions; what of it is set depends on the step."""

    active: ActiveTokens
    """Tokens of the open recursion, or the candidates of the next one."""
    hidden: Tensor | None = None
    """Residual stream of all tokens, [S, B, H]; None while `rows` are all there is (no routing)."""
    rows: Tensor | None = None
    """Working rows of the active tokens, [k, B, H] or [T, 1, H]."""
    gate: Tensor | None = None
    """Weight with which the rows come back, [k, B, 1] or [T, 1, 1]; None: they are added as they are."""
    depth: Tensor | None = None
    """token_choice: 0-based depth of each token, [S, B] int64."""

    def merged(self, rows: LocalRows) -> Stream:
        """The rows brought back: h[t] + g_t * y_t at the active tokens. The active set stays."""
        hidden = self.hidden
        if hidden is None:
            hidden = self.rows
        elif self.active.count > 0:
            hidden = rows.combine(hidden, self.rows, self.gate, self.active)
        return replace(self, hidden=hidden, rows=None, gate=None)


class Routing(Protocol):
    """What a routing method does in one recursion."""

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Decide on recursion r; sets `active`, `rows` and `gate`."""

    def close(self, r: int, stream: Stream) -> Stream:
        """Bring back the rows that leave after recursion r."""


class EveryToken(nn.Module):
    """No routing: every token passes every recursion, with nothing added around it."""

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """The residual stream itself is worked on."""
        return replace(stream, hidden=None, rows=stream.hidden) if r == 0 else stream

    def close(self, r: int, stream: Stream) -> Stream:
        """Nothing comes back before the end."""
        return stream


def run_recursions(
    routing: Routing,
    hidden: Tensor,
    active: ActiveTokens,
    block: Block,
    num_recursions: int,
    context: RoutingContext,
    lockstep: bool = False,
) -> Stream:
    """All recursions on one rank: residual stream [S, B, H] -> the same, in `Stream.hidden`.

    Args:
        lockstep: pass every block even where no token is active, because other ranks do.
    """
    stream = Stream(active, hidden)
    for r in range(num_recursions):
        stream = routing.open(r, stream, context)
        if r < context.depth(num_recursions):
            if stream.active.count > 0:
                stream = replace(stream, rows=block(r, stream.rows, stream.active))
            elif lockstep:
                stream = _walk_along(r, stream, block)
        if r < num_recursions - 1:
            stream = routing.close(r, stream)
    return stream


def _walk_along(r: int, stream: Stream, block: Block) -> Stream:
    """One row through the block, forward and backward, without effect.

    Under ZeRO-3, weights are gathered where a block is entered, by all data-parallel ranks together.
    """
    everything = ActiveTokens(stream.active.seq_length, stream.active.batch_size)
    first = everything.take(torch.zeros(1, 1, dtype=torch.int64, device=stream.hidden.device), ragged=True)
    update = block(r, stream.hidden[:1, :1], first)
    return replace(stream, hidden=stream.hidden + 0.0 * update.sum())
