"""The model on the rows of many sequences: the layers around the block in turns, the block in passes.

enter    embedding and first layers of new rows, which then open recursion 0
advance  one pass of the block for all open rows, whatever their recursion
leave    last layers, final norm and head for sequences whose rows have all left the block

On an accelerator, each of them sends the host's numbers in one copy, and a pass asks once which rows go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mor_megatron.huggingface.attention_mor import rotation_of
from mor_megatron.huggingface.modeling_mor import NEVER, MoRForCausalLM
from mor_megatron.recursion.plan import VirtualLayer
from mor_megatron.serving.attention import AnyReads, DeviceReads, Reads, View, run_layer
from mor_megatron.serving.cohort import GONE, Cohort, Entry, Rows
from mor_megatron.serving.kernel import DeviceKernels, Kernel, store_rows
from mor_megatron.serving.lanes import Lanes, RoutingOptions
from mor_megatron.serving.pages import Pages, Store
from mor_megatron.serving.transfer import fetch, send


@dataclass
class Entering:
    """Tokens that enter the model, sequence after sequence, in causal order."""

    slot: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    options: list[RoutingOptions] = field(default_factory=list)


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
        kernel: for attention; on a CPU of single rows, or None: PyTorch alone.
    """

    def __init__(self, model: MoRForCausalLM, store: Store, longest: int, kernel: Kernel | DeviceKernels | None):
        self.model, self.store, self.kernel = model, store, kernel
        self.plan, self.method = model.model.plan, model.model.router
        self.device, config = model.device, model.config
        self.store_rows = store_rows if self.device.type == "cpu" else kernel.store
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.rotation = rotation_of(torch.arange(longest, device=self.device), model.config, model.dtype)
        self.cohorts: list[Cohort] = []
        self.lanes: Lanes | None = None
        """Where sequences decode, on an accelerator; None: they are cohorts."""
        self.passes, self.turns = 0, 0

    @property
    def is_open(self) -> bool:
        """Whether any row is inside the block."""
        return any(cohort.is_open for cohort in self.cohorts) or (self.lanes is not None and self.lanes.is_open.any())

    def open_slots(self) -> set[int]:
        """Sequences with rows inside the block."""
        slots = {slot for cohort in self.cohorts for slot in cohort.open_slots()}
        return slots if self.lanes is None else slots | self.lanes.open_slots()

    def open_rows(self) -> list[int]:
        """Rows at each recursion, [Nr]."""
        rows = Counter()
        for cohort in self.cohorts:
            rows[cohort.recursion] += len(cohort.active)
        if self.lanes is not None:
            rows.update(self.lanes.recursion[self.lanes.is_open].tolist())
        return [rows[r] for r in range(self.plan.num_recursions)]

    def demand(self) -> dict[tuple[int, int], int]:
        """(slot, table of the block) -> rows that the next pass adds to it; not all tables that have room for them."""
        rows: Counter[tuple[int, int]] = Counter()
        for cohort in self.cohorts:
            if cohort.recursion < self.store.recursions:
                for slot, count in cohort.open_slots().items():
                    rows[slot, slot * self.store.recursions + cohort.recursion] += count
        if self.lanes is not None:
            rows.update(self.lanes.demand())
        return rows

    def forget(self, slot: int) -> None:
        """A sequence has left; its pages may go to others at once."""
        for cohort in self.cohorts:
            cohort.forget([slot])
        if self.lanes is not None:
            self.lanes.forget(slot)
        self._sweep()

    def enter(self, rows: Entering) -> None:
        """New rows; their tables have pages for them."""
        self.turns += 1
        slot, position, ids = (np.array(x, np.int64) for x in (rows.slot, rows.position, rows.ids))
        rest = np.arange(len(ids))
        if self.lanes is not None:
            counts = Counter(rows.slot)
            decodes = [counts[s] == 1 and o == self.lanes.options for s, o in zip(rows.slot, rows.options, strict=True)]
            own, rest = np.flatnonzero(decodes), np.flatnonzero(~np.array(decodes))
            if len(own):
                self.lanes.enter(slot[own], position[own], ids[own])
        if len(rest):
            self._enter_cohorts(slot[rest], position[rest], ids[rest], [rows.options[i] for i in rest.tolist()])

    def _enter_cohorts(
        self, slot: np.ndarray, position: np.ndarray, ids: np.ndarray, options: list[RoutingOptions]
    ) -> None:
        """A cohort for the rows of each kind of options."""
        places: dict[RoutingOptions, list[int]] = {}
        for i, own in enumerate(options):
            places.setdefault(own, []).append(i)
        kinds = [np.array(mine) for mine in places.values()] if len(places) > 1 else [np.arange(len(ids))]
        entries = [Entry(slot[mine], position[mine], ids[mine]) for mine in kinds]
        more = [ids, *kinds, *(array for entry in entries for array in entry.arrays)]
        if self.plan.first:
            view, more = self._view(self.store.ends, slot, position, slot, position, more=more)
        else:
            more = send(more, self.device)
        x = self.model.model.embed_tokens(more[0])
        if self.plan.first:
            x = self._layers(self.plan.first, x, view)
        np.add.at(self.store.ends.rows, slot, 1)
        kinds, sent = more[1 : 1 + len(kinds)], iter(more[1 + len(kinds) :])
        for (depth, threshold), mine, entry in zip(places, kinds, entries, strict=True):
            own, arrays = x if len(kinds) == 1 else x[mine], [next(sent) for _ in entry.arrays]
            self.cohorts.append(Cohort.enter(self.method, own, entry, arrays, threshold=threshold, fixed_depth=depth))

    def advance(self) -> None:
        """One pass of the block; the tables have pages for it (`demand`)."""
        go = None if self.lanes is None or not self.lanes.is_open.any() else self.lanes.advance()
        self._settle(self._advance_cohorts(), go)
        self.passes += 1
        self._sweep()

    def _advance_cohorts(self) -> list[tuple[Cohort, Tensor]]:
        """Those that have candidates, and who of them goes on."""
        cohorts = [cohort for cohort in self.cohorts if cohort.is_open]
        if not cohorts:
            return []
        rows = Rows([(cohort, cohort.active) for cohort in cohorts])
        view, order = self._block_view(rows)
        x = rows.gather([cohort.stream.rows for cohort in cohorts], order)
        x = self._layers(self.plan.pass_layers(0), self.model.model.opened(x, view.recursion), view)
        live = [cohort.close(own) for cohort, own in zip(cohorts, rows.scatter(x, order), strict=True)]
        return [(cohort, own) for cohort, own in zip(cohorts, live, strict=True) if own is not None]

    def _settle(self, candidates: list[tuple[Cohort, Tensor]], lanes: Tensor | None) -> None:
        """Ask which of the candidates, and of the lanes, go on."""
        asked = [own for _, own in candidates] + ([] if lanes is None else [lanes])
        if not asked:
            return
        live = np.split(
            fetch(torch.cat(asked) if len(asked) > 1 else asked[0]), np.cumsum([len(x) for x in asked])[:-1]
        )
        for (cohort, _), own in zip(candidates, live, strict=False):
            cohort.settle(own)
        if lanes is not None:
            self.lanes.settle(live[-1])

    def leave(self, slots: list[int], wanted: dict[int, int]) -> Left:
        """Take out sequences whose rows have all passed the block.

        Args:
            wanted: by slot, of how many of its last rows the logits are needed.
        """
        own = [] if self.lanes is None else [slot for slot in slots if self.lanes.is_present[slot]]
        if not own:
            return self._leave_cohorts(slots, wanted)
        depths = {slot: [depth] for slot, depth in zip(own, self.lanes.recursion[own].tolist(), strict=True)}
        logits, needed = self.lanes.leave(np.array(own)), [wanted[slot] == 1 for slot in own]
        rest = [slot for slot in slots if slot not in depths]
        if all(needed) and not rest:
            return Left(depths, logits)
        others = self._leave_cohorts(rest, wanted) if rest else Left({}, logits[:0])
        owner = np.array([*own, *(slot for slot in rest for _ in range(wanted[slot]))])
        there = np.flatnonzero(np.append(needed, np.ones(len(others.logits), bool)))
        (index,) = send([there[np.argsort(owner[there], kind="stable")]], self.device)
        return Left({**depths, **others.depths}, torch.cat([logits, others.logits])[index])

    def _leave_cohorts(self, slots: list[int], wanted: dict[int, int]) -> Left:
        parts = [(cohort, cohort.places(slots)) for cohort in self.cohorts]
        parts = [(cohort, places) for cohort, places in parts if len(places) > 0]
        rows, hidden = Rows(parts), [cohort.stream.hidden for cohort, _ in parts]
        for cohort, _ in parts:
            cohort.forget(slots)
        self._sweep()
        begin = np.flatnonzero(np.append(True, rows.slot[1:] != rows.slot[:-1]))
        end, slots = np.append(begin[1:], len(rows.slot)), rows.slot[begin].tolist()
        depths = {slot: rows.depths[b:e].tolist() for slot, b, e in zip(slots, begin, end, strict=True)}
        needed = np.concatenate([np.arange(e - wanted[slot], e) for slot, e in zip(slots, end, strict=True)])
        return Left(depths, self._logits(hidden, [places for _, places in parts], rows, needed))

    def _logits(self, hidden: list[Tensor], places: list[np.ndarray], rows: Rows, needed: np.ndarray) -> Tensor:
        """Last layers of all rows, which stand at `places` of `hidden`, and the head of the needed ones."""
        more, reads = [*places, needed, *rows.arrays], None
        if self.plan.last:
            reads = self._reads(self.store.ends, rows.slot[needed], rows.position[needed] + 1)
            more += reads.arrays
            view, more = self._view(self.store.ends, rows.slot, rows.position, rows.slot, rows.position, more=more)
        else:
            more = send(more, self.device)
        own, wanted, more = more[: len(places)], more[len(places)], more[len(places) + 1 :]
        order, more = more[: len(rows.arrays)], more[len(rows.arrays) :]
        x = rows.gather([h[mine] for h, mine in zip(hidden, own, strict=True)], order)
        if len(needed) == len(x):
            wanted = None
        if self.plan.last:
            reads.receive(more)
            x = self._layers(self.plan.last[:-1], x, view)
            x = self._layers(self.plan.last[-1:], x, view, wanted, reads)
        elif wanted is not None:
            x = x[wanted]
        logits = self.model.lm_head(self.model.model.norm(x))
        if self.model.config.padding_row is not None:
            logits[:, self.model.config.padding_row] = NEVER
        return logits

    def _layers(
        self,
        uses: Sequence[VirtualLayer],
        x: Tensor,
        view: View,
        wanted: Tensor | None = None,
        reads: AnyReads | None = None,
    ) -> Tensor:
        """Layers, one after the other."""
        for use in uses:
            x = run_layer(self.model.model.layers[use.physical], x, use.index, view, wanted, reads or view.reads)
        return x

    def _block_view(self, rows: Rows) -> tuple[View, list[Tensor]]:
        """Of a pass of the block, and the order of its rows; new rows are counted."""
        block, count = self.store.block, self.store.recursions
        if count < self.plan.num_recursions:  # all recursions read the table of recursion 0
            table, at, writers = rows.slot * count, rows.position, rows.recursion == 0
        else:
            table, writers = rows.slot * count + rows.recursion, np.ones(len(rows.slot), bool)
            row = np.arange(len(table))
            first = np.maximum.accumulate(row * np.append(True, table[1:] != table[:-1]))
            at = block.rows[table] + row - first
        np.add.at(block.rows, table[writers & (rows.slot != GONE)], 1)
        writers = None if writers.all() else np.flatnonzero(writers)
        arrays = [rows.recursion, *rows.arrays]
        view, (recursion, *order) = self._view(block, rows.slot, rows.position, table, at, writers, arrays)
        first = int(rows.recursion[0])
        return replace(view, recursion=first if (rows.recursion == first).all() else recursion), order

    def _view(
        self,
        pages: Pages,
        slot: np.ndarray,
        position: np.ndarray,
        table: np.ndarray,
        at: np.ndarray,
        writers: np.ndarray | None = None,
        more: Sequence[np.ndarray] = (),
    ) -> tuple[View, list[Tensor]]:
        """Of rows that stand at places `at` of their tables, and more arrays that are needed on the device. Rows of
        nobody write to page 0."""
        nobody, seen = slot == GONE, at + 1
        if nobody.any():
            table, at, seen = np.where(nobody, len(pages.table) - 1, table), np.where(nobody, 0, at), seen * ~nobody
        places = pages.table[table, at // pages.size].astype(np.int64) * pages.size + at % pages.size
        reads = self._reads(pages, table, seen)
        stored = [places] if writers is None else [places[writers], writers]
        arrays = [position, *stored, *reads.arrays]
        sent = send([*arrays, *more], self.device)
        reads.receive(sent[1 + len(stored) : len(arrays)])
        rotation = (self.rotation[0][sent[0]], self.rotation[1][sent[0]])
        view = View(pages, rotation, None if writers is None else sent[2], sent[1], reads, store=self.store_rows)
        return view, sent[len(arrays) :]

    def _reads(self, pages: Pages, table: np.ndarray, seen: np.ndarray) -> AnyReads:
        if self.device.type == "cpu":
            return Reads(pages, table, seen, self.kernel)
        return DeviceReads(pages, table, seen, self.kernel, self.group)

    def _sweep(self) -> None:
        self.cohorts = [cohort for cohort in self.cohorts if not cohort.is_empty]
