"""Do all tensor-parallel ranks route alike? They must: each holds a part of the layers that the same tokens pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.distributed.cpu import device


class RoutingMismatchError(RuntimeError):
    """Tensor-parallel ranks took different routing decisions; what was trained since is worthless."""


def check_decision(where: str, name: str, decision: Tensor) -> None:
    """Compare one decision before anything is done by it; collective over a tensor-parallel group.

    Args:
        where: iteration and micro-batch, for the message.
        name: of the decision.
        decision: mask of active tokens, or depths, [S, B].
    Raises:
        RoutingMismatchError: on every rank of the group.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    mine = _digest(decision).to(device())
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, mine, group=group)
    values = torch.stack(digests).tolist()
    if len(set(values)) == 1:
        return
    ranks = dist.get_process_group_ranks(group)
    odd = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != values[0]]
    raise RoutingMismatchError(
        f"{where}: {name} of tensor-parallel rank {', '.join(odd)} differs from that of rank {ranks[0]}: their routers "
        "or hidden states have drifted apart; restart from the last checkpoint, and look for memory errors there"
    )


def _digest(decision: Tensor) -> Tensor:
    """A number that tells decisions apart, int64: a polynomial of the values at a fixed point, modulo 2^64."""
    values = decision.reshape(-1).to(torch.int64)
    weights = torch.arange(1, values.numel() + 1, device=values.device) * 0x9E3779B97F4A7C1
    return ((values + 1) * weights * (weights >> 7)).sum()
