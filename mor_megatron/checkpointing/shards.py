"""How state is named and divided in a checkpoint, whatever the layout of the run that wrote it.

A *shard entry* is consecutive elements of one parameter's shard under tensor parallelism, of one kind: the fp32 weight,
or a state of the optimizer. Ranks write what they update, so nothing is written twice; readers join the entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mor_megatron.distributed.sharding import cut, join

WEIGHT, STEP, BUFFER = "weight", "step", "buffer"
"""Kinds beside the optimizer's own names of its states (exp_avg, exp_avg_sq, momentum_buffer)."""


@dataclass(frozen=True)
class ShardEntry:
    """Its name: `kind/parameter/shard/offset`."""

    kind: str
    """weight, exp_avg, exp_avg_sq, momentum_buffer; step: one number, of updates; buffer: no parameter."""
    name: str
    """Of the parameter, in the whole model."""
    shard: int
    """Tensor-parallel rank whose shard it is of; 0 for what is not divided."""
    offset: int
    """First element in that shard, flattened."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}/{self.shard}/{self.offset}"

    @classmethod
    def parse(cls, text: str) -> ShardEntry:
        """The inverse of `str`.

        Raises:
            ValueError: it is no name of a shard entry.
        """
        kind, name, shard, offset = text.split("/")
        if not (shard.isdecimal() and offset.isdecimal()):
            raise ValueError(text)
        return cls(kind, name, int(shard), int(offset))


@dataclass(frozen=True)
class Sharding:
    """A parameter of the whole model, and how tensor parallelism divides it."""

    shape: tuple[int, ...]
    """In full, vocabulary padding included."""
    dim: int | None = None
    """Dimension that is divided; None: every rank has all of it."""
    stride: int = 1
    """Parts that are each divided along it."""
    size: int = 1
    """Tensor-parallel ranks."""
    rows: int | None = None
    """Rows without vocabulary padding, whose amount depends on the layout; None: there is no vocabulary in it."""

    @property
    def unpadded(self) -> tuple[int, ...]:
        """Shape without padding: what two layouts of one model have in common."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def shards(self) -> int:
        """Tensor-parallel ranks that have different elements."""
        return 1 if self.dim is None else self.size

    @property
    def shard_numel(self) -> int:
        """Elements of one shard."""
        return math.prod(self.shape) // self.shards

    def join(self, shards: list[Tensor]) -> Tensor:
        """The whole without padding, from the flat shards of all ranks."""
        if self.dim is None:
            (whole,) = shards
            whole = whole.view(self.shape)
        else:
            shape = list(self.shape)
            shape[self.dim] //= self.size
            whole = join([shard.view(shape) for shard in shards], self.dim, self.stride)
        return whole if self.rows is None else whole[: self.rows]

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """The flat shard of one rank, from the whole without padding, which is filled with zeros."""
        if self.rows is not None:
            padded = whole.new_zeros(self.shape)
            padded[: self.rows] = whole
            whole = padded
        return whole.reshape(-1) if self.dim is None else cut(whole, self.dim, self.stride, rank, self.size).reshape(-1)
