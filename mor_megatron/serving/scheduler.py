"""Which requests run, what enters the model next, and who makes room when pages run out."""

from __future__ import annotations

from collections import deque

import numpy as np

from mor_megatron.serving.pages import Pages
from mor_megatron.serving.prefix import PrefixCache
from mor_megatron.serving.request import Request
from mor_megatron.serving.runner import Entering, Runner


class Scheduler:
    """Requests, waiting and running.

    Args:
        runner: of the model.
        prefixes: None: prompts share nothing.
        lanes: sequences that run at a time.
        chunk: most rows of prompts inside the model at a time.
    """

    def __init__(self, runner: Runner, prefixes: PrefixCache | None, lanes: int, chunk: int):
        self.runner, self.store, self.prefixes, self.chunk = runner, runner.store, prefixes, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """The oldest first."""
        self.slots = list(range(lanes - 1, -1, -1))
        self.preemptions, self.prompt_tokens, self.cached_tokens = 0, 0, 0
        self._shares = (1.0, *runner.method.planned_fractions()[: self.store.recursions])
        """Of a sequence's tokens, by table."""

    def finished(self) -> list[Request]:
        """Running requests whose rows have all passed the block."""
        open_slots = self.runner.open_slots()
        return [request for request in self.running if request.in_flight and request.slot not in open_slots]

    def arrivals(self) -> int:
        """Waiting requests that a turn could let in."""
        can_enter = self.waiting and self.slots and self._fits(self.waiting[0])
        return min(len(self.waiting), len(self.slots)) if can_enter else 0

    def admit(self) -> None:
        """Start waiting requests, in order, as long as there are slots and pages for them."""
        while self.waiting and self.slots and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            request.slot = self.slots.pop()
            self.running.append(request)
            if self.prefixes is not None and request.params.prompt_logprobs is None:
                chain = self.prefixes.find(request)
                if chain:
                    self.prefixes.attach(request, chain)
                if request.preemptions == 0:
                    request.cached = request.done
                    self.cached_tokens += request.done
            if request.preemptions == 0:
                self.prompt_tokens += len(request.prompt)

    def entering(self) -> Entering:
        """Rows that enter the model now, with pages for them: a token of each request that decodes, and as much of
        the prompts of others as a chunk allows. A request has one chunk in the model at a time."""
        flights = [request.in_flight for request in self.running]
        room = self.chunk - sum(flight for flight in flights if flight > 1)
        counts: dict[Request, int] = {}
        for request, flight in zip(self.running, flights, strict=True):
            count = len(request.tokens) - request.fed
            if flight == 0 and count > 0:
                if count > 1:
                    count = min(count, max(0, room))
                    room -= count
                if count:
                    counts[request] = count
        self.reserve(self.store.ends, {(request, request.slot): count for request, count in counts.items()})
        rows = Entering()
        for request in sorted((r for r in counts if r.slot >= 0), key=lambda request: request.slot):
            begin, request.fed = request.fed, request.fed + counts[request]
            known = len(request.depths)
            for place in range(begin, request.fed):
                rows.slot.append(request.slot)
                rows.position.append(place)
                rows.ids.append(request.tokens[place])
                # What was decided once stays so: a request that comes back follows its own depths.
                depth = request.depths[place] if place < known else request.depth
                rows.options.append((depth, request.threshold))
        return rows

    def reserve_pass(self) -> None:
        """Pages for the next pass of the block."""
        demand = self.runner.demand()
        if demand:
            running = {request.slot: request for request in self.running}
            self.reserve(self.store.block, {(running[slot], table): rows for (slot, table), rows in demand.items()})

    def reserve(self, pages: Pages, demand: dict[tuple[Request, int], int]) -> None:
        """Pages for more rows.

        If there are not enough, blocks that only the prefix cache has are forgotten, and then the youngest requests are
        preempted, who need not be among those that `demand`, and whose rows are dropped.

        Args:
            demand: (request, table) -> rows.
        """
        while True:
            wanted = [(table, rows) for (request, table), rows in demand.items() if request.slot >= 0]
            tables, rows = np.array(wanted, np.int64).reshape(-1, 2).T
            missing = pages.missing(tables, rows)
            total = int(missing.sum())
            if total <= len(pages.free) or (self.prefixes is not None and self.prefixes.evict(pages, total)):
                break
            self.preempt(self.running[-1])
        for i in np.flatnonzero(missing).tolist():
            pages.grow(tables[i], missing[i])

    def preempt(self, request: Request) -> None:
        """Give up a running request's pages. It will be computed again, first among those that wait."""
        self.remove(request)
        request.fed = request.done = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Take out a request, whether it runs or waits."""
        if request.slot < 0:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.runner.forget(request.slot)
        self.store.release(request.slot)
        self.slots.append(request.slot)
        request.slot = -1
        request.chain = []

    def _fits(self, request: Request) -> bool:
        """Whether pages are there for what a request will probably have when its tokens are in, beside those that the
        running ones lack for theirs: otherwise it would soon be preempted. One that would be alone always fits:
        `Engine.add` has seen to it."""
        if not self.running:
            return True
        lacking = zip(*map(self._lacking, (request, *self.running)), strict=True)
        there = (len(pages.free) + pages.reclaimable() for pages in self.store.kinds)
        return all(sum(counts) <= pages for counts, pages in zip(lacking, there, strict=True))

    def _lacking(self, request: Request) -> list[int]:
        """Pages of each kind that a request will probably need for its tokens and the next one, but has not got."""
        counts = [0, 0]
        for share, table in zip(self._shares, self.store.tables(request.slot), strict=True):
            held = 0 if request.slot < 0 else int(table.pages.held[table.index])
            needed = table.pages.needed(int(share * len(request.tokens)) + 1)
            counts[table.pages is self.store.block] += max(0, needed - held)
        return counts
