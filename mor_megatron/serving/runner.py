"""The model on the rows of many sequences: the layers around the block in turns, the block in passes.

enter    embedding and first layers of new rows, which then open recursion 0
advance  one pass of the block for all open rows, whatever their recursion
leave    last layers, final norm and head for sequences whose rows have all left the block
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mor_megatron.huggingface.attention_mor import rotation_of
from mor_megatron.huggingface.modeling_mor import NEVER, MoRForCausalLM
from mor_megatron.serving.attention import Reads, View, run_layer
from mor_megatron.serving.cohort import GONE, Cohort
from mor_megatron.serving.kernel import Kernel
from mor_megatron.serving.pages import Pages, Store

Options = tuple[int | None, float]
"""Fixed depth, and router threshold."""


@dataclass
class Entering:
    """Tokens that enter the model, sequence after sequence, in causal order."""

    slot: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    options: list[Options] = field(default_factory=list)


@dataclass
class Left:
    """What came out of the model."""

    depths: dict[int, list[int]]
    """By slot: recursions of its rows."""
    logits: Tensor | None
    """[W, V] of the wanted rows, slot after slot."""


class Runner:
    """Runs a model; its methods are called in inference mode.

    Args:
        model: in evaluation mode.
        store: keys and values.
        longest: most tokens of a sequence.
        kernel: for attention of single rows; None: PyTorch alone.
    """

    def __init__(self, model: MoRForCausalLM, store: Store, longest: int, kernel: Kernel | None):
        self.model, self.store, self.kernel = model, store, kernel
        self.plan, self.method = model.model.plan, model.model.router
        self.device = model.device
        self.first = [use.physical for use in self.plan.first]
        self.last = [use.physical for use in self.plan.last]
        self.block = [use.physical for use in self.plan.pass_layers(0)]
        self.rotation = rotation_of(torch.arange(longest, device=self.device), model.config, model.dtype)
        self.cohorts: list[Cohort] = []
        self.passes, self.turns, self.rows = 0, 0, 0

    @property
    def is_open(self) -> bool:
        """Whether any row is inside the block."""
        return any(cohort.is_open for cohort in self.cohorts)

    def open_slots(self) -> set[int]:
        """Sequences with rows inside the block."""
        return {slot for cohort in self.cohorts for slot in cohort.open_slots()}

    def open_rows(self) -> list[int]:
        """Rows at each recursion, [Nr]."""
        rows = Counter()
        for cohort in self.cohorts:
            rows[cohort.recursion] += len(cohort.active)
        return [rows[r] for r in range(self.plan.num_recursions)]

    def demand(self) -> dict[tuple[int, int], int]:
        """(slot, table of the block) -> rows that the next pass adds to it."""
        rows: Counter[tuple[int, int]] = Counter()
        for cohort in self.cohorts:
            if cohort.recursion < self.store.recursions:
                for slot, count in cohort.open_slots().items():
                    rows[slot, slot * self.store.recursions + cohort.recursion] += count
        return rows

    def forget(self, slot: int) -> None:
        """A sequence has left; its pages may go to others at once."""
        for cohort in self.cohorts:
            cohort.forget([slot])
        self._sweep()

    def enter(self, rows: Entering) -> None:
        """New rows; their tables have pages for them."""
        self.turns += 1
        slot, position, ids = (np.array(x, np.int64) for x in (rows.slot, rows.position, rows.ids))
        x = self.model.model.embed_tokens(torch.from_numpy(ids).to(self.device))
        if self.first:
            view = self._view(self.store.ends, slot, position, position)
            x = self._layers(self.first, x, view)
        for table, count in Counter(rows.slot).items():
            self.store.ends.rows[table] += count
        kinds: dict[Options, list[int]] = {}
        for i, options in enumerate(rows.options):
            kinds.setdefault(options, []).append(i)
        for (depth, threshold), mine in kinds.items():
            own = x if len(kinds) == 1 else x[self._tensor(np.array(mine))]
            arrays = (array[mine] for array in (slot, position, ids))
            self.cohorts.append(Cohort.enter(self.method, own, *arrays, threshold=threshold, fixed_depth=depth))

    def advance(self) -> None:
        """One pass of the block; the tables have pages for it (`demand`)."""
        cohorts = [cohort for cohort in self.cohorts if cohort.is_open]
        slot = np.concatenate([c.slots[c.sequence[c.active]] for c in cohorts])
        position = np.concatenate([c.position[c.active] for c in cohorts])
        recursion = np.concatenate([np.full(len(c.active), c.recursion) for c in cohorts])
        order, back = self._order(slot, position)
        x = torch.cat([c.stream.rows for c in cohorts])
        if order is not None:
            slot, position, recursion, x = slot[order], position[order], recursion[order], x[self._tensor(order)]
        x = self._layers(self.block, x, self._block_view(slot, position, recursion))
        if order is not None:
            x = x[self._tensor(back)]
        for cohort, rows in zip(cohorts, x.split([len(c.active) for c in cohorts]), strict=True):
            cohort.close(rows)
        self.passes += 1
        self.rows += len(slot)
        self._sweep()

    def leave(self, slots: list[int], wanted: dict[int, int]) -> Left:
        """Take out sequences whose rows have all passed the block.

        Args:
            wanted: by slot, of how many of its last rows the logits are needed; 0 if it is not there.
        """
        parts = [(cohort, *cohort.take_out(slots)) for cohort in self.cohorts]
        parts = [(cohort, hidden, places) for cohort, hidden, places in parts if len(places)]
        slot = np.concatenate([c.slots[c.sequence[places]] for c, _, places in parts])
        position = np.concatenate([c.position[places] for c, _, places in parts])
        depths = np.concatenate([c.depths[places] for c, _, places in parts])
        x = torch.cat([hidden for _, hidden, _ in parts])
        order, _ = self._order(slot, position)
        if order is not None:
            slot, position, depths, x = slot[order], position[order], depths[order], x[self._tensor(order)]
        for cohort in self.cohorts:
            cohort.forget(slots)
        self._sweep()
        ends = np.append(np.flatnonzero(np.diff(slot)) + 1, len(slot))
        counts = np.array([wanted.get(s, 0) for s in slot[ends - 1].tolist()])
        left = {s: part.tolist() for s, part in zip(slot[ends - 1].tolist(), np.split(depths, ends[:-1]), strict=True)}
        rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        return Left(left, self._logits(x, slot, position, rows))

    def _logits(self, x: Tensor, slot: np.ndarray, position: np.ndarray, rows: np.ndarray) -> Tensor | None:
        wanted = None if len(rows) == len(x) else self._tensor(rows)
        if self.last:
            x = self._layers(self.last, x, self._view(self.store.ends, slot, position, position), wanted, rows)
        elif wanted is not None:
            x = x[wanted]
        if len(rows) == 0:
            return None
        logits = self.model.lm_head(self.model.model.norm(x))
        if self.model.config.padding_row is not None:
            logits[:, self.model.config.padding_row] = NEVER
        return logits

    def _layers(
        self, layers: list[int], x: Tensor, view: View, wanted: Tensor | None = None, rows: np.ndarray | None = None
    ) -> Tensor:
        """Physical layers one after the other. The last one gives the wanted rows only; they are `rows` to the host."""
        for number in layers:
            reads, some = view.reads, None
            if wanted is not None and number == layers[-1]:
                reads, some = Reads(reads.pages, reads.table[rows], reads.seen[rows], self.kernel, self.device), wanted
            x = run_layer(self.model.model.layers[number], x, number, view, some, reads)
        return x

    def _block_view(self, slot: np.ndarray, position: np.ndarray, recursion: np.ndarray) -> View:
        """Of a pass of the block, whose rows come slot after slot, those of nobody first."""
        block, count = self.store.block, self.store.recursions
        if count < self.plan.num_recursions:  # all recursions read the table of recursion 0
            table, at = slot * count, position
            first = recursion == 0
            new, amounts = np.unique(slot[first & (slot != GONE)], return_counts=True)
            block.rows[new] += amounts
            return self._view(block, slot, position, at, table, None if first.all() else np.flatnonzero(first))
        table = slot * count + recursion
        begin = np.flatnonzero(np.append(True, table[1:] != table[:-1]))
        lengths = np.diff(np.append(begin, len(table)))
        at = block.rows[table] + np.arange(len(table)) - np.repeat(begin, lengths)
        mine = slot[begin] != GONE
        block.rows[table[begin][mine]] += lengths[mine]
        return self._view(block, slot, position, at, table)

    def _view(
        self,
        pages: Pages,
        slot: np.ndarray,
        position: np.ndarray,
        at: np.ndarray,
        table: np.ndarray | None = None,
        writers: np.ndarray | None = None,
    ) -> View:
        """Of rows that stand at places `at` of their tables."""
        nobody = slot == GONE
        table = np.where(nobody, len(pages.table) - 1, slot if table is None else table)
        at = np.where(nobody, 0, at)
        places = pages.table[table, at // pages.size].astype(np.int64) * pages.size + at % pages.size
        reads = Reads(pages, table, np.where(nobody, 0, at + 1), self.kernel, self.device)
        index = self._tensor(position)
        rotation = (self.rotation[0][index], self.rotation[1][index])
        if writers is None:
            return View(pages, rotation, None, self._tensor(places), reads)
        return View(pages, rotation, self._tensor(writers), self._tensor(places[writers]), reads)

    def _order(self, slot: np.ndarray, position: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """An order slot after slot, by position, and the way back; None: it is so already."""
        before, after = slot[:-1], slot[1:]
        if ((before < after) | ((before == after) & (position[:-1] < position[1:]))).all():
            return None, None
        order = np.lexsort((position, slot))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return order, back

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _sweep(self) -> None:
        self.cohorts = [cohort for cohort in self.cohorts if not cohort.is_empty]
