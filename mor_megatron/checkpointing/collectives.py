"""What all ranks have to know of each other while they save and load."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_all_ranks(mine: T) -> list[T]:
    """A small object of every rank, in rank order; collective."""
    objects: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, mine)
    return objects


def from_rank_0(mine: T) -> T:
    """Rank 0's object; collective."""
    box = [mine]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(mine: bool) -> bool:
    """Whether it holds on some rank; collective."""
    return any(from_all_ranks(mine))
