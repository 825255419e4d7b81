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
from mor_megatron.serving.cohort import GONE, Cohort, Rows
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


@dataclass(frozen=True)
class Left:
    """What came out of the model."""

    depths: dict[int, list[int]]
    """By slot: recursions of its rows."""
    logits: Tensor
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
        self.passes, self.turns = 0, 0

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
            x = self._layers(self.first, x, self._view(self.store.ends, slot, position, slot, position))
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
        rows = Rows([(cohort, cohort.active) for cohort in cohorts])
        x = rows.gather([cohort.stream.rows for cohort in cohorts])
        x = self._layers(self.block, x, self._block_view(rows))
        for cohort, own in zip(cohorts, rows.scatter(x), strict=True):
            cohort.close(own)
        self.passes += 1
        self._sweep()

    def leave(self, slots: list[int], wanted: dict[int, int]) -> Left:
        """Take out sequences whose rows have all passed the block.

        Args:
            wanted: by slot, of how many of its last rows the logits are needed.
        """
        parts = [(cohort, cohort.places(slots)) for cohort in self.cohorts]
        parts = [(cohort, places) for cohort, places in parts if len(places) > 0]
        rows = Rows(parts)
        x = rows.gather([cohort.stream.hidden[self._tensor(places)] for cohort, places in parts])
        for cohort, _ in parts:
            cohort.forget(slots)
        self._sweep()
        begin = np.flatnonzero(np.append(True, rows.slot[1:] != rows.slot[:-1]))
        end, slots = np.append(begin[1:], len(x)), rows.slot[begin].tolist()
        depths = {slot: rows.depths[b:e].tolist() for slot, b, e in zip(slots, begin, end, strict=True)}
        needed = np.concatenate([np.arange(e - wanted[slot], e) for slot, e in zip(slots, end, strict=True)])
        return Left(depths, self._logits(x, rows, needed))

    def _logits(self, x: Tensor, rows: Rows, needed: np.ndarray) -> Tensor:
        """Last layers of all rows, and the head of the needed ones."""
        wanted = None if len(needed) == len(x) else self._tensor(needed)
        if self.last:
            view = self._view(self.store.ends, rows.slot, rows.position, rows.slot, rows.position)
            reads = Reads(view.pages, rows.slot[needed], rows.position[needed] + 1, self.kernel, self.device)
            x = self._layers(self.last[:-1], x, view)
            x = self._layers(self.last[-1:], x, view, wanted, reads)
        elif wanted is not None:
            x = x[wanted]
        logits = self.model.lm_head(self.model.model.norm(x))
        if self.model.config.padding_row is not None:
            logits[:, self.model.config.padding_row] = NEVER
        return logits

    def _layers(
        self, layers: list[int], x: Tensor, view: View, wanted: Tensor | None = None, reads: Reads | None = None
    ) -> Tensor:
        """Physical layers, one after the other."""
        for number in layers:
            x = run_layer(self.model.model.layers[number], x, number, view, wanted, reads or view.reads)
        return x

    def _block_view(self, rows: Rows) -> View:
        """Of a pass of the block; its new rows are counted."""
        block, count = self.store.block, self.store.recursions
        if count < self.plan.num_recursions:  # all recursions read the table of recursion 0
            table, at, writers = rows.slot * count, rows.position, rows.recursion == 0
        else:
            table, writers = rows.slot * count + rows.recursion, np.ones(len(rows.slot), bool)
            begin = np.flatnonzero(np.append(True, table[1:] != table[:-1]))
            lengths = np.diff(np.append(begin, len(table)))
            at = block.rows[table] + np.arange(len(table)) - np.repeat(begin, lengths)
        new, counts = np.unique(table[writers & (rows.slot != GONE)], return_counts=True)
        block.rows[new] += counts
        return self._view(
            block, rows.slot, rows.position, table, at, None if writers.all() else np.flatnonzero(writers)
        )

    def _view(
        self,
        pages: Pages,
        slot: np.ndarray,
        position: np.ndarray,
        table: np.ndarray,
        at: np.ndarray,
        writers: np.ndarray | None = None,
    ) -> View:
        """Of rows that stand at places `at` of their tables. Those of nobody write to page 0."""
        nobody = slot == GONE
        table, at = np.where(nobody, len(pages.table) - 1, table), np.where(nobody, 0, at)
        places = pages.table[table, at // pages.size].astype(np.int64) * pages.size + at % pages.size
        reads = Reads(pages, table, np.where(nobody, 0, at + 1), self.kernel, self.device)
        index = self._tensor(position)
        rotation = (self.rotation[0][index], self.rotation[1][index])
        if writers is None:
            return View(pages, rotation, None, self._tensor(places), reads)
        return View(pages, rotation, self._tensor(writers), self._tensor(places[writers]), reads)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _sweep(self) -> None:
        self.cohorts = [cohort for cohort in self.cohorts if not cohort.is_empty]
