"""How tensor parallelism cuts a weight; Megatron-core marks each with `partition_dim` and `partition_stride`."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(full: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """This rank's share of a full weight.

    Args:
        full: the whole weight.
        dim: dimension that is cut.
        stride: parts that are each cut by themselves (2 for the fused gate and up projections).
        rank: tensor-parallel rank.
        size: tensor-parallel ranks.
    """
    parts = full.chunk(stride, dim)
    return torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)


def join(shares: list[Tensor], dim: int, stride: int) -> Tensor:
    """The inverse of `cut`: the full weight from the shares of all ranks, in rank order."""
    pieces = [share.chunk(stride, dim) for share in shares]
    return torch.cat([piece[part] for part in range(stride) for piece in pieces], dim)
