"""Sequences that decode on an accelerator: one row each, in buffers that never move.

A pass over one row reads as many weights as one over thirty, and its kernels take less time than Python needs to launch
them. So each of three functions has static shapes, padded to a few sizes, and can be replayed as a CUDA graph:

enter  embedding and first layers of m rows, which then open recursion 0
block  one pass of the block over n rows, each at its own recursion, and who goes on
turn   last layers, norm and head of m rows

The routing method sees all lanes at once, once for each recursion, and what it says counts for the rows that are there.
The last lane is nobody's: it pads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor_megatron.huggingface.attention_mor import Pair
from mor_megatron.huggingface.modeling_mor import NEVER, MoRForCausalLM
from mor_megatron.huggingface.rows_mor import Rows as Tokens
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.routing import Stream
from mor_megatron.serving.attention import StaticReads, View, run_layer
from mor_megatron.serving.kernel import DeviceKernels
from mor_megatron.serving.pages import Pages, Store
from mor_megatron.serving.transfer import Numbers

logger = logging.getLogger(__name__)

RoutingOptions = tuple[int | None, float]
"""Fixed depth, and router threshold."""


class Lanes:
    """The rows of sequences that decode with the model's own routing options.

    Args:
        model: in evaluation mode.
        store: keys and values.
        rotation: cos and sin at all positions.
        count: lanes.
        options: of the model.
        kernels: of the device.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        store: Store,
        rotation: Pair,
        count: int,
        options: RoutingOptions,
        kernels: DeviceKernels,
    ):
        self.model, self.store, self.rotation, self.options, self.kernels = model, store, rotation, options, kernels
        self.plan, self.method, self.device = model.model.plan, model.model.router, model.device
        depth, threshold = options
        self.ids = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        self.context = RoutingContext(
            selection="threshold",
            losses="none",
            metrics=None,
            tokens=self.ids,
            fixed_depth=depth,
            threshold=threshold,
        )
        self.recursions = self.context.depth(self.plan.num_recursions)
        self.nobody = count
        self.sizes = sorted({min(1 << i, count) for i in range(count.bit_length() + 1)})
        # Of each lane, on the host.
        self.is_present = np.zeros(count + 1, bool)
        self.is_open = np.zeros(count + 1, bool)
        self.position = np.zeros(count + 1, np.int64)
        self.recursion = np.zeros(count + 1, np.int64)
        """Recursions that the row has passed."""
        # And on the device.
        everyone = torch.arange(count + 1, device=self.device)
        self.tokens = Tokens(everyone, torch.zeros_like(everyone), (1,) * (count + 1), deferred=True)
        self.go = torch.zeros(count + 1, dtype=torch.bool, device=self.device)
        self.hidden = torch.zeros(count + 1, model.config.hidden_size, dtype=model.dtype, device=self.device)
        opened = self.method(0, self._stream(self.go, rows=None, hidden=self.hidden), self.context)
        self.rows, self.gate, self.choice = (_copied(x) for x in (opened.rows, opened.gate, opened.choice))
        self.keeps_hidden = opened.hidden is not None
        self.functions: dict[tuple[str, int], tuple[Numbers, Callable[[], Tensor]]] = {}
        """What is read and what is called, by name and rows."""
        self.is_captured = False

    def prepare(self, make: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
        """All functions of all sizes, each as `make` makes it; run once."""
        self.functions = {}
        for name in ("enter", "block", "turn"):
            for size in self.sizes:
                numbers, function = self._build(name, size)
                self.functions[name, size] = numbers, make(function)
                self.functions[name, size][1]()

    # What is there.

    def open_slots(self) -> set[int]:
        """Lanes whose row is inside the block."""
        return set(np.flatnonzero(self.is_open).tolist())

    def demand(self) -> Iterator[tuple[int, int]]:
        """(slot, table of the block) that the next pass adds a row to, and that has no room for it."""
        count = self.store.recursions
        slots = np.flatnonzero(self.is_open & (self.recursion < count))
        tables = slots * count + self.recursion[slots]
        lacks = self.store.block.missing(tables, 1) > 0
        return zip(slots[lacks].tolist(), tables[lacks].tolist(), strict=True)

    def forget(self, slot: int) -> None:
        """The sequence has left."""
        self.is_present[slot] = self.is_open[slot] = False

    # What is done.

    def enter(self, slot: np.ndarray, position: np.ndarray, ids: np.ndarray) -> None:
        """New rows, [m]; their tables have pages for them."""
        self.is_present[slot] = self.is_open[slot] = True
        self.position[slot], self.recursion[slot] = position, 0
        self._call("enter", slot, position, self.store.ends, slot, position, position + 1, ids=ids)
        self.store.ends.rows[slot] += 1

    def advance(self) -> Tensor | None:
        """One pass of the block.

        Returns:
            Which lanes go on, for `settle`; None: the host knows.
        """
        block, count = self.store.block, self.store.recursions
        slot = np.flatnonzero(self.is_open)
        recursion = self.recursion[slot]
        if count < self.plan.num_recursions:  # all recursions read the table of recursion 0
            table, at, writes = slot, self.position[slot], recursion == 0
        else:
            table, writes = slot * count + recursion, np.ones(len(slot), bool)
            at = block.rows[table]
        here = np.full(len(self.recursion), -1)
        here[slot] = recursion
        self._call("block", slot, self.position[slot], block, table, np.where(writes, at, -1), at + 1, recursion=here)
        block.rows[table[writes]] += 1
        self.recursion[slot] += 1
        self.is_open[slot] = recursion + 1 < self.recursions
        return self.go if self.method.routes and self.is_open.any() else None

    def settle(self, go: np.ndarray) -> None:
        """Leave out the rows that do not go on. `go` is what `advance` gave, on the host."""
        self.is_open &= go

    def leave(self, slot: np.ndarray) -> Tensor:
        """Logits of rows that have passed the block, [m, V]; they hold until the next turn."""
        position = self.position[slot]
        logits = self._call("turn", slot, position, self.store.ends, slot, position, position + 1)
        self.is_present[slot] = False
        return logits[: len(slot)]

    def _call(
        self,
        name: str,
        slot: np.ndarray,
        position: np.ndarray,
        pages: Pages,
        table: np.ndarray,
        at: np.ndarray,
        seen: np.ndarray,
        **more: np.ndarray,
    ) -> Tensor:
        """Run a function on rows that stand at places `at` of their tables; -1: they are not stored."""
        size = next(size for size in self.sizes if size >= len(slot))
        numbers, function = self.functions[name, size]
        places = pages.table[table, at // pages.size].astype(np.int64) * pages.size + at % pages.size
        numbers.send(
            slot=(slot, self.nobody),
            position=(position, 0),
            places=(np.where(at < 0, 0, places), 0),
            tables=(pages.table[table], 0),
            seen=(seen, 0),
            **{key: (value, 0) for key, value in more.items()},
        )
        return function()

    def _build(self, name: str, size: int) -> tuple[Numbers, Callable[[], Tensor]]:
        """What a function of `size` rows reads, and the function."""
        pages = self.store.block if name == "block" else self.store.ends
        row = {key: (size,) for key in ("slot", "position", "places", "seen")}
        more = {"enter": {"ids": (size,)}, "block": {"recursion": (len(self.recursion),)}, "turn": {}}[name]
        numbers = Numbers(self.device, **row, tables=(size, pages.table.shape[1]), **more)
        body = {"enter": self._enter, "block": self._block, "turn": self._turn}[name]
        sent = numbers.parts
        sent["slot"].fill_(self.nobody)
        if name == "block":
            sent["recursion"].fill_(-1)

        def function() -> Tensor:
            index = sent["position"]
            rotation = (self.rotation[0][index], self.rotation[1][index])
            reads = StaticReads(sent["tables"], sent["seen"], pages.size, self.kernels)
            recursion = sent["recursion"][sent["slot"]] if name == "block" else None
            return body(sent, View(pages, rotation, None, sent["places"], reads, recursion, self.kernels.store))

        return numbers, function

    # The functions. Their shapes depend on nothing but their size.

    def _enter(self, sent: dict[str, Tensor], view: View) -> Tensor:
        x = self._layers(self.plan.first, self.model.model.embed_tokens(sent["ids"]), view)
        self.ids.index_copy_(0, sent["slot"], sent["ids"])
        self.hidden.index_copy_(0, sent["slot"], x)
        here = torch.zeros_like(self.go).index_fill_(0, sent["slot"], True)
        self._store(here, self.method(0, self._stream(here, rows=None, hidden=self.hidden), self.context))
        return self.hidden

    def _block(self, sent: dict[str, Tensor], view: View) -> Tensor:
        x = self.model.model.opened(self.rows[sent["slot"]], view.recursion)
        x = self._layers(self.plan.pass_layers(0), x, view)
        rows = self.rows.index_copy(0, sent["slot"], x)
        self.go.zero_()
        for r in range(self.recursions):
            here = sent["recursion"] == r
            stream = self._stream(here, rows, self.hidden if self.keeps_hidden else None)
            if r + 1 == self.recursions:
                self._store(here, self.method.merged(stream))
            else:
                stream = self.method(r + 1, self.method.close(r, stream), self.context)
                self._store(here, stream)
                self.go |= here if stream.active.live is None else here & stream.active.live
        return self.go

    def _turn(self, sent: dict[str, Tensor], view: View) -> Tensor:
        x = self._layers(self.plan.last, self.hidden[sent["slot"]], view)
        logits = self.model.lm_head(self.model.model.norm(x))
        if self.model.config.padding_row is not None:
            logits[:, self.model.config.padding_row] = NEVER
        return logits

    def _layers(self, uses: tuple, x: Tensor, view: View) -> Tensor:
        for use in uses:
            layer = self.model.model.layers[use.physical]
            x = run_layer(layer, x, use.index, view, None, view.reads)
        return x

    def _stream(self, here: Tensor, rows: Tensor | None, hidden: Tensor | None) -> Stream:
        """As if the rows that are `here`, [lanes + 1], were all there are."""
        tokens = replace(self.tokens, live=here)
        if rows is None:
            return Stream(tokens, tokens, hidden)
        return Stream(tokens, tokens, hidden, rows, self.gate, self.choice)

    def _store(self, here: Tensor, stream: Stream) -> None:
        """Write what became of the rows that are `here`."""
        for old, new in zip(
            (self.hidden, self.rows, self.gate, self.choice),
            (stream.hidden, stream.rows, stream.gate, stream.choice),
            strict=True,
        ):
            _write(here, old, new)


def _copied(x: Any) -> Any:
    """A copy of the tensors of dataclasses."""
    if is_dataclass(x):
        return replace(x, **{field.name: _copied(getattr(x, field.name)) for field in fields(x)})
    return torch.zeros_like(x) if isinstance(x, Tensor) else x


def _write(here: Tensor, old: Any, new: Any) -> None:
    """Write the values of some lanes into the tensors of dataclasses; each tensor has a row for each lane."""
    if is_dataclass(new):
        for field in fields(new):
            _write(here, getattr(old, field.name), getattr(new, field.name))
    elif isinstance(new, Tensor) and new is not old:
        torch.where(here.view(-1, *(1,) * (new.ndim - 1)), new, old, out=old)
