"""How state is named and cut in a checkpoint, whatever the layout of the run that wrote it.

A *piece* is a run of consecutive elements of one parameter's share under tensor parallelism, of one kind: the fp32
weight, or a state of the optimizer. Ranks write the pieces they update, so nothing is written twice; readers join them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.distributed.replicated import is_tied_copy
from mor_megatron.distributed.sharding import cut, join
from mor_megatron.model.mor_model import EMBEDDING, HEAD
from mor_megatron.training.engine import Engine

WEIGHT, STEP, BUFFER = "weight", "step", "buffer"
"""Kinds beside the optimizer's own names of its states (exp_avg, exp_avg_sq, momentum_buffer)."""


@dataclass(frozen=True)
class Piece:
    """Its name: `kind/parameter/share/offset`."""

    kind: str
    """weight, exp_avg, exp_avg_sq, momentum_buffer; step: one number, of updates; buffer: no parameter."""
    name: str
    """Of the parameter, in the whole model."""
    share: int
    """Tensor-parallel rank whose share it is of; 0 for what is not cut."""
    offset: int
    """First element in that share, flattened."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}/{self.share}/{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Piece:
        """The inverse of `str`.

        Raises:
            ValueError: it is no name of a piece.
        """
        kind, name, share, offset = text.split("/")
        if not (share.isdecimal() and offset.isdecimal()):
            raise ValueError(text)
        return cls(kind, name, int(share), int(offset))


@dataclass(frozen=True)
class Cut:
    """A parameter of the whole model, and how tensor parallelism cuts it."""

    shape: tuple[int, ...]
    """In full, vocabulary padding included."""
    dim: int | None = None
    """Dimension that is cut; None: every rank has all of it."""
    stride: int = 1
    """Parts that are cut by themselves along it."""
    size: int = 1
    """Tensor-parallel ranks."""
    rows: int | None = None
    """Rows without vocabulary padding, whose amount depends on the layout; None: there is no vocabulary in it."""

    @property
    def unpadded(self) -> tuple[int, ...]:
        """Shape without padding: what two layouts of one model have in common."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def shares(self) -> int:
        """Tensor-parallel ranks that have different elements."""
        return 1 if self.dim is None else self.size

    @property
    def share_numel(self) -> int:
        """Elements of one share."""
        return math.prod(self.shape) // self.shares

    def join(self, shares: list[Tensor]) -> Tensor:
        """The whole without padding, from the flat shares of all ranks."""
        if self.dim is None:
            (whole,) = shares
            whole = whole.view(self.shape)
        else:
            shape = list(self.shape)
            shape[self.dim] //= self.size
            whole = join([share.view(shape) for share in shares], self.dim, self.stride)
        return whole if self.rows is None else whole[: self.rows]

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """The flat share of one rank, from the whole without padding, which is filled with zeros."""
        if self.rows is not None:
            padded = whole.new_zeros(self.shape)
            padded[: self.rows] = whole
            whole = padded
        return whole.reshape(-1) if self.dim is None else cut(whole, self.dim, self.stride, rank, self.size).reshape(-1)


def cut_of(name: str, parameter: nn.Parameter, engine: Engine) -> Cut:
    """How this run cuts a parameter of this rank's part of the model."""
    shape = list(engine.shard_shape(parameter))
    rows = engine.module.vocab_size if name in (EMBEDDING, HEAD) else None
    if not getattr(parameter, "tensor_model_parallel", False):
        return Cut(tuple(shape), rows=rows)
    size = parallel_state.get_tensor_model_parallel_world_size()
    shape[parameter.partition_dim] *= size
    return Cut(tuple(shape), parameter.partition_dim, parameter.partition_stride, size, rows)


def stored_name(name: str, parameter: nn.Parameter) -> str:
    """The name under which a checkpoint has it: a copy of the tied embedding is stored once, as the embedding."""
    return EMBEDDING if is_tied_copy(parameter) else name
