"""Rows that entered the shared block together, and how the routing method moves them.

A *cohort* has the rows that entered in one turn under the same routing options. They are at the same recursion until
they leave, so what `recursion.routing.run_recursions` does in a loop is done here one recursion at a time, by the same
methods, with the rows of other cohorts beside them in every pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mor_megatron.huggingface.rows_mor import Rows
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.routing import RoutingMethod, Stream

GONE = -1
"""Slot of rows whose sequence has left the engine, or has taken them out of the cohort."""


@dataclass(eq=False)
class Cohort:
    """Rows inside the block.

    Args:
        method: of the model.
        context: routing options of all of the rows.
        stream: with recursion 0 open.
        slots: of each sequence of the rows, [B].
        sequence: index into `slots` of each row, [T].
        position: of each row in its sequence, [T].
    """

    method: RoutingMethod
    context: RoutingContext
    stream: Stream
    slots: np.ndarray
    sequence: np.ndarray
    position: np.ndarray

    def __post_init__(self):
        self.recursion = 0
        self.depths = np.zeros(len(self.sequence), np.int8)
        """Recursions that each row has passed."""
        self.active = np.arange(len(self.sequence))
        """Rows of the open recursion."""

    @classmethod
    def enter(
        cls, method: RoutingMethod, hidden: Tensor, slot: np.ndarray, position: np.ndarray, ids: np.ndarray, **options
    ) -> Cohort:
        """Open recursion 0 for rows [T, H], which come slot after slot, in causal order.

        Args:
            slot, position, ids: of each row, [T].
            options: threshold and fixed depth of a `RoutingContext`.
        """
        slots, sequence = np.unique(slot, return_inverse=True)
        lengths = tuple(np.bincount(sequence).tolist())
        rows = Rows(*(torch.from_numpy(x).to(hidden.device) for x in (sequence, position)), lengths)
        tokens = torch.from_numpy(ids).to(hidden.device)
        context = RoutingContext(selection="threshold", losses="none", metrics=None, tokens=tokens, **options)
        stream = method(0, Stream(rows, rows, hidden), context)
        return cls(method, context, stream, slots, sequence, position)

    @property
    def is_open(self) -> bool:
        """Whether any row goes on."""
        return len(self.active) > 0

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits for any row."""
        return bool((self.slots == GONE).all())

    def open_slots(self) -> dict[int, int]:
        """Sequences that have rows in the open recursion, and how many."""
        if not self.is_open:
            return {}
        lengths = zip(self.slots.tolist(), self.stream.active.lengths, strict=True)
        return {slot: count for slot, count in lengths if count and slot != GONE}

    def close(self, rows: Tensor) -> None:
        """End the open recursion with its new rows, and open the next one."""
        stream = replace(self.stream, rows=rows)
        self.depths[self.active] += 1
        r, method = self.recursion, self.method
        if r + 1 < self.context.depth(method.plan.num_recursions):
            stream = method.close(r, stream)
            if stream.active.count > 0:
                stream = method(r + 1, stream, self.context)
            index = stream.active.index
            self.active = np.arange(len(self.sequence)) if index is None else index.cpu().numpy()
        else:
            stream, self.active = stream.merged(method.layout), self.active[:0]
        self.stream, self.recursion = stream, r + 1

    def take_out(self, slots: list[int]) -> tuple[Tensor, np.ndarray]:
        """Rows of sequences that have passed the block; they are gone from here.

        Returns:
            Their residual stream [T', H], and their places among the cohort's rows [T'].
        """
        mine = np.isin(self.slots, slots)
        places = np.flatnonzero(mine[self.sequence])
        hidden = self.stream.hidden[torch.from_numpy(places).to(self.stream.hidden.device)] if len(places) else None
        return hidden, places

    def forget(self, slots: list[int]) -> None:
        """Nobody waits for the rows of these sequences any more. Those in the block go on until they leave it."""
        self.slots[np.isin(self.slots, slots)] = GONE
