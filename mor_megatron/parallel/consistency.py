"""Do all tensor-parallel ranks route alike? They must: each holds a part of the layers that the same tokens pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.parallel.cpu import device
from mor_megatron.recursion.context import RoutingContext


class RoutingMismatchError(RuntimeError):
    """Tensor-parallel ranks took different routing decisions; what was trained since is worthless."""


def check_routing(contexts: list[RoutingContext], iteration: int) -> None:
    """Compare the decisions of an iteration; collective over a tensor-parallel group.

    Args:
        contexts: of this rank's micro-batches, with their traces.
        iteration: for the message.
    Raises:
        RoutingMismatchError: on every rank of the group, naming the first decision that differs.
    """
    decisions = {
        f"micro-batch {index}, {name}": value
        for index, context in enumerate(contexts)
        for name, value in (context.trace or {}).items()
        if not value.is_floating_point()  # masks of active tokens, depths
    }
    if not decisions:
        return
    group = parallel_state.get_tensor_model_parallel_group()
    mine = torch.stack([_digest(value).to(device()) for value in decisions.values()])
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, mine, group=group)
    for where, values in zip(decisions, torch.stack(digests, dim=1).tolist(), strict=True):
        if len(set(values)) > 1:
            ranks = dist.get_process_group_ranks(group)
            odd = [rank for rank, value in zip(ranks, values, strict=True) if value != values[0]]
            raise RoutingMismatchError(
                f"iteration {iteration}: {where} differs between tensor-parallel ranks {ranks[0]} and "
                f"{', '.join(map(str, odd))}: their routers or hidden states have drifted apart; restart from the last "
                "checkpoint, and look for memory errors on these ranks"
            )


def _digest(decision: Tensor) -> Tensor:
    """A number that tells decisions apart, int64: a polynomial of the values at a fixed point, modulo 2^64."""
    values = decision.reshape(-1).to(torch.int64)
    weights = torch.arange(1, values.numel() + 1, device=values.device) * 0x9E3779B97F4A7C1
    return ((values + 1) * weights * (weights >> 7)).sum()
