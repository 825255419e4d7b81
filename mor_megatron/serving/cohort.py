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

from mor_megatron.huggingface.rows_mor import Rows as Tokens
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
        rows = Tokens(*(torch.from_numpy(x).to(hidden.device) for x in (sequence, position)), lengths)
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

    def places(self, slots: list[int]) -> np.ndarray:
        """Which rows are those of some sequences."""
        return np.flatnonzero(np.isin(self.slots, slots)[self.sequence])

    def forget(self, slots: list[int]) -> None:
        """Nobody waits for the rows of these sequences any more. Those in the block go on until they leave it."""
        self.slots[np.isin(self.slots, slots)] = GONE


class Rows:
    """Rows of several cohorts, put into one order: sequence after sequence, each in causal order.

    The rows of a sequence are in several cohorts if their depths are fixed differently.

    Args:
        parts: cohorts, and which of their rows.
    """

    def __init__(self, parts: list[tuple[Cohort, np.ndarray]]):
        self.lengths = [len(places) for _, places in parts]
        self.slot = np.concatenate([cohort.slots[cohort.sequence[places]] for cohort, places in parts])
        self.position = np.concatenate([cohort.position[places] for cohort, places in parts])
        self.recursion = np.concatenate([np.full(len(places), cohort.recursion) for cohort, places in parts])
        self.depths = np.concatenate([cohort.depths[places] for cohort, places in parts])
        self.order: np.ndarray | None = None
        """None: they stand in order already."""
        before, after = self.slot[:-1], self.slot[1:]
        if not ((before < after) | ((before == after) & (self.position[:-1] < self.position[1:]))).all():
            self.order = np.lexsort((self.position, self.slot))
            for name in ("slot", "position", "recursion", "depths"):
                setattr(self, name, getattr(self, name)[self.order])

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Values of each cohort's rows, in order, [T, ..]."""
        x = torch.cat(parts)
        return x if self.order is None else x[torch.from_numpy(self.order).to(x.device)]

    def scatter(self, x: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `gather`."""
        if self.order is not None:
            x = torch.empty_like(x).index_copy_(0, torch.from_numpy(self.order).to(x.device), x)
        return x.split(self.lengths)
