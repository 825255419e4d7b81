"""Rows that entered the shared block together, and how the routing method moves them.

A *cohort* has the rows that entered in one turn under the same routing options. They are at the same recursion until
they leave, so what `recursion.routing.run_recursions` does in a loop is done here one recursion at a time, by the same
methods, with the rows of other cohorts beside them in every pass. Which rows go on is asked for all cohorts at once.
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


class Entry:
    """Rows that are about to enter, slot after slot, in causal order.

    Args:
        slot, position, ids: of each row, [T].
    """

    def __init__(self, slot: np.ndarray, position: np.ndarray, ids: np.ndarray):
        self.slots, self.sequence = np.unique(slot, return_inverse=True)
        self.position = position
        self.arrays = (self.sequence, position, ids)
        """What is needed on the device."""


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
        """Rows of the open recursion; before `settle`, the candidates."""

    @classmethod
    def enter(cls, method: RoutingMethod, hidden: Tensor, entry: Entry, sent: list[Tensor], **options) -> Cohort:
        """Open recursion 0 for rows [T, H].

        Args:
            sent: `entry.arrays` on the device.
            options: threshold and fixed depth of a `RoutingContext`.
        """
        sequence, position, ids = sent
        rows = Tokens(sequence, position, tuple(np.bincount(entry.sequence).tolist()), deferred=True)
        context = RoutingContext(selection="threshold", losses="none", metrics=None, tokens=ids, **options)
        stream = method(0, Stream(rows, rows, hidden), context)
        return cls(method, context, stream, entry.slots, entry.sequence, entry.position)

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

    def close(self, rows: Tensor) -> Tensor | None:
        """End the open recursion with its new rows, and open the next one.

        Returns:
            Which of the candidates go on, [T'], for `settle`; None: all of them do, or none is left.
        """
        stream = replace(self.stream, rows=rows)
        self.depths[self.active] += 1
        r, method = self.recursion, self.method
        self.recursion += 1
        if r + 1 == self.context.depth(method.plan.num_recursions):
            self.stream, self.active = method.merged(stream), self.active[:0]
            return None
        self.stream = method(r + 1, method.close(r, stream), self.context)
        if self.stream.active.index is None:  # a method may choose among all rows again
            self.active = np.arange(len(self.sequence))
        return self.stream.active.live

    def settle(self, live: np.ndarray) -> None:
        """Leave out the candidates that do not go on. `live` is what `close` gave, on the host."""
        stream, self.active = self.stream, self.active[live]
        if (self.depths[self.active] < self.recursion).any():
            raise ValueError(f"routing={self.method.name} opens recursion {self.recursion} for a token that has left")
        active = replace(stream.active, live=None)
        if not live.all():
            index = torch.nonzero_static(stream.active.live, size=len(self.active)).squeeze(1)
            lengths = np.bincount(self.sequence[self.active], minlength=len(self.slots))
            active = active.select(index, tuple(lengths.tolist()))
            gate = None if stream.gate is None else stream.gate[index]
            stream = replace(stream, rows=stream.rows[index], gate=gate)
        self.stream = replace(stream, active=active)

    def places(self, slots: list[int]) -> np.ndarray:
        """Which rows are those of some sequences."""
        return np.flatnonzero(self._are(slots)[self.sequence])

    def forget(self, slots: list[int]) -> None:
        """Nobody waits for the rows of these sequences any more. Those in the block go on until they leave it."""
        self.slots[self._are(slots)] = GONE

    def _are(self, slots: list[int]) -> np.ndarray:
        """Which of its sequences are among some. A cohort has few, for which `np.isin` would take longer."""
        among = set(slots)
        return np.array([slot in among for slot in self.slots.tolist()], bool)


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

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What `gather` and `scatter` need on the device."""
        return () if self.order is None else (self.order,)

    def gather(self, parts: list[Tensor], sent: list[Tensor]) -> Tensor:
        """Values of each cohort's rows, in order, [T, ..]."""
        x = torch.cat(parts)
        return x[sent[0]] if sent else x

    def scatter(self, x: Tensor, sent: list[Tensor]) -> tuple[Tensor, ...]:
        """The inverse of `gather`."""
        if sent:
            x = torch.empty_like(x).index_copy_(0, sent[0], x)
        return x.split(self.lengths)
