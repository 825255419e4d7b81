"""Small objects that ranks tell each other."""

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


def first_problem(mine: str | None) -> str | None:
    """The problem of the first rank that has one, None if no rank has; collective.

    What a rank alone raised would leave the others waiting for it.
    """
    return next((each for each in from_all_ranks(mine) if each is not None), None)
