"""Rows of a residual stream that is cut by sequence over tensor-parallel ranks (sequence parallelism).

Any set of R rows is held in equal shares: rank i has rows i*ceil(R/T) to (i+1)*ceil(R/T), the last share filled up with
zero rows. Which token stands where is known to every rank, for routing decisions are; so moving rows from one set to
another is one all-to-all of exactly the rows that change place, and its backward is the same in reverse. The host has
to know how many rows go where: it reads these numbers once for each set that rows move to or from.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mor_megatron.recursion.dispatch import ActiveTokens, AddRows, LocalRows, RowAddition


class ShardedRows(LocalRows):
    """`LocalRows` over the ranks of a tensor-parallel group; tensors of rows are this rank's shares."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | str = "cpu",
        add_rows: RowAddition = AddRows.apply,
    ):
        super().__init__(device, add_rows)
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.known: MutableMapping[Tensor, _Routes] = WeakTensorKeyDictionary()
        """Routes to rows at an index, as long as the index is in use: rows come back the way they went."""

    def gather(self, hidden: Tensor, active: ActiveTokens) -> Tensor:
        """[S/T, B, H] -> this rank's share of the active rows, [ceil(k/T), B, H]."""
        return self._moved(hidden, ActiveTokens(active.seq_length, active.batch_size), active.rows)

    def take(self, rows: Tensor, active: ActiveTokens, index: Tensor | None) -> Tensor:
        """This rank's share of the rows at `index`."""
        return self._moved(rows, active, index)

    def combine(self, hidden: Tensor, rows: Tensor, gate: Tensor | None, active: ActiveTokens) -> Tensor:
        """Every rank adds to its own part of the residual stream; the gate is that of all active tokens."""
        width = hidden.shape[-1]
        if gate is not None:
            # Each rank weighs its own tokens, and the gradient of every gate has to come to where it was computed.
            gate = copy_to_tensor_model_parallel_region(gate, group=self.group)
        if active.rows is None:
            share = hidden.shape[0]
            gate = None if gate is None else gate[self.rank * share : (self.rank + 1) * share]
            return super().combine(hidden, rows, gate, ActiveTokens(*hidden.shape[:2]))
        routes = self._routes(ActiveTokens(active.seq_length, active.batch_size), active.rows)
        own = _Move.apply(rows.reshape(-1, width), routes.reversed(), self.group)
        gate = None if gate is None else gate.reshape(-1, 1)[routes.taken].to(hidden.dtype)
        return self.add_rows(hidden.reshape(-1, width), own, gate, routes.source).view_as(hidden)

    def collect(self, values: Tensor, active: ActiveTokens) -> Tensor:
        """[ceil(R/T), C, W] -> [R, C, W]. Every rank makes the same of it, so its gradient is cut, not summed."""
        gathered = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.group)
        return gathered[: active.shape[0]]

    def _moved(self, x: Tensor, held: ActiveTokens, index: Tensor | None) -> Tensor:
        if index is None:
            return x
        routes = self._routes(held, index)
        rows = _Move.apply(x.reshape(-1, x.shape[-1]), routes, self.group)
        return rows.view(-(-index.shape[0] // self.size), index.shape[1], x.shape[-1])

    def _routes(self, held: ActiveTokens, index: Tensor) -> _Routes:
        """From rows held as `held` to the rows `index` [R', C'], flat indexes into them."""
        flat = index.reshape(-1)
        here, there = -(-held.shape[0] // self.size) * held.shape[1], -(-index.shape[0] // self.size) * index.shape[1]
        if index in self.known and self.known[index].num_source == here:
            return self.known[index]
        source_rank = torch.div(flat, here, rounding_mode="floor")
        target_rank = torch.div(torch.arange(flat.numel(), device=flat.device), there, rounding_mode="floor")
        ways = flat.new_zeros(self.size**2).index_add_(
            0, source_rank * self.size + target_rank, torch.ones_like(flat)
        )  # rows from each rank to each
        ways = ways.tolist()
        sent, received = ways[self.rank * self.size : (self.rank + 1) * self.size], ways[self.rank :: self.size]
        taken = torch.nonzero_static(source_rank == self.rank, size=sum(sent)).view(-1)
        mine = source_rank[self.rank * there : (self.rank + 1) * there]
        routes = _Routes(
            taken=taken,
            source=flat[taken] - self.rank * here,
            sent=sent,
            received=received,
            target=mine.argsort(stable=True),
            num_source=here,
            num_target=there,
        )
        self.known[index] = routes
        return routes


@dataclass(frozen=True)
class _Routes:
    """What one rank sends and receives."""

    taken: Tensor
    """Which of all moved rows are sent from here."""
    source: Tensor
    """Their places in this rank's source, grouped by the rank they go to."""
    sent: list[int]
    received: list[int]
    target: Tensor
    """Places of the received rows in this rank's target."""
    num_source: int
    num_target: int

    def reversed(self) -> _Routes:
        """Back from target to source; the rows arrive in the order of `source`, without empty places."""
        in_order = torch.arange(self.source.numel(), device=self.source.device)
        return _Routes(
            self.taken, self.target, self.received, self.sent, in_order, self.num_target, self.source.numel()
        )


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, routes: _Routes, group: dist.ProcessGroup) -> Tensor:
        ctx.routes, ctx.group = routes, group
        return _all_to_all(rows, routes.source, routes.sent, routes.received, routes.target, routes.num_target, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        routes = ctx.routes
        grad = _all_to_all(
            grad, routes.target, routes.received, routes.sent, routes.source, routes.num_source, ctx.group
        )
        return grad, None, None


def _all_to_all(
    rows: Tensor, source: Tensor, sent: list[int], received: list[int], target: Tensor, num_rows: int, group
) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[-1])
    dist.all_to_all_single(arrived, rows.index_select(0, source), received, sent, group=group)
    out = rows.new_zeros(num_rows, rows.shape[-1])
    out[target] = arrived
    return out
