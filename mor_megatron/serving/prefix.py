"""The prefix cache: keys and values of prompts that begin alike are computed once.

Routing is causal, so what the tables of a sequence hold after n tokens depends on these tokens alone. A *block* stands
for as many tokens as a page has rows, after all blocks before it. It knows the pages that have its tokens' rows in each
table, and how many rows each table has at its end. A sequence that begins with the tokens of a chain of blocks takes
their full pages, which nobody writes any more, and copies the last page of a table if it is not full.

A block's key is the serial number of the block before it and its own tokens; the first one's is the routing options. So
equal keys mean equal tokens, and blocks are found by tokens, not by a digest that others could match.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

from mor_megatron.serving.pages import Pages, Store
from mor_megatron.serving.request import Request


@dataclass(eq=False)
class Block:
    """The rows of some tokens that follow those of a parent."""

    key: tuple
    parent: Block | None
    serial: int
    depths: list[int]
    """Recursions of its tokens."""
    counts: list[int]
    """Rows in each table of a sequence that ends here."""
    pages: list[list[int]]
    """Pages of each table that have rows of its tokens."""
    children: set[Block] = field(default_factory=set)
    is_alive: bool = True


class PrefixCache:
    """Blocks, the least recently used first."""

    def __init__(self, store: Store):
        self.store, self.size = store, store.block.size
        self.blocks: OrderedDict[tuple, Block] = OrderedDict()
        self._serial = count()

    def find(self, request: Request) -> list[Block]:
        """The longest chain that a request begins with. One token at least is left to compute, for its logits."""
        chain: list[Block] = []
        before = _root(request)
        for start in range(0, len(request.tokens) - self.size, self.size):
            end = start + self.size
            block = self.blocks.get((before, tuple(request.tokens[start:end])))
            known = request.depths[start:end]  # of a preempted request, which follows them
            if block is None or block.depths[: len(known)] != known:
                break
            chain.append(block)
            before = block.serial
        return chain

    def attach(self, request: Request, chain: list[Block]) -> None:
        """Begin the empty tables of a request with a chain. Without room for the copies, nothing happens."""
        self._touch(chain)
        ends = [(table, chain[-1].counts[i]) for i, table in enumerate(self.store.tables(request.slot))]
        for pages in self.store.kinds:
            if not self.evict(pages, sum(table.pages is pages and rows % self.size > 0 for table, rows in ends)):
                return
        if not chain[-1].is_alive:
            return
        for i, (table, rows) in enumerate(ends):
            pages, full, part = table.pages, *divmod(rows, self.size)
            for page in (held := _pages(chain, i, self.size))[:full]:
                pages.hold(page)
                pages.append(table.index, page)
            if part:
                copy = pages.take()
                pages.copy(held[full], copy)
                pages.append(table.index, copy)
            pages.rows[table.index] = rows
        request.depths[: len(chain) * self.size] = [depth for block in chain for depth in block.depths]
        request.fed = request.done = len(chain) * self.size
        request.chain = chain

    def publish(self, request: Request) -> None:
        """Offer the complete blocks of a running request to others."""
        chain = request.chain
        while chain and not chain[-1].is_alive:
            chain.pop()
        if request.done < (len(chain) + 1) * self.size:
            return
        tables = list(self.store.tables(request.slot))
        for start in range(len(chain) * self.size, request.done - self.size + 1, self.size):
            end = start + self.size
            parent = chain[-1] if chain else None
            depths = request.depths[start:end]
            key = (parent.serial if parent else _root(request), tuple(request.tokens[start:end]))
            block = self.blocks.get(key)
            if block is None:
                before = parent.counts if parent else [0] * len(tables)
                counts = [n + sum(d > t.recursion for d in depths) for n, t in zip(before, tables, strict=True)]
                pages = [
                    t.pages.table[t.index, a // self.size : t.pages.needed(b)].tolist() if b > a else []
                    for t, a, b in zip(tables, before, counts, strict=True)
                ]
                block = self._add(Block(key, parent, next(self._serial), depths, counts, pages))
            elif block.depths != depths:  # rounding has flipped a decision: the rows of the two do not mix
                break
            chain.append(block)
        self._touch(chain)

    def evict(self, pages: Pages, wanted: int) -> bool:
        """Forget blocks until so many pages are free; whether they are."""
        if len(pages.free) < wanted and pages.reclaimable() > 0:
            for block in list(self.blocks.values()):
                held = [page for owner, page in self._held(block) if owner is pages]
                if block.is_alive and any(pages.references[page] == pages.cached[page] for page in held):
                    self._forget(block)
                if len(pages.free) >= wanted:
                    break
        return len(pages.free) >= wanted

    def clear(self) -> None:
        """Forget everything."""
        for block in list(self.blocks.values()):
            self._forget(block)

    def _add(self, block: Block) -> Block:
        self.blocks[block.key] = block
        if block.parent is not None:
            block.parent.children.add(block)
        for pages, page in self._held(block):
            pages.hold(page)
            pages.cached[page] += 1
        return block

    def _forget(self, block: Block) -> None:
        """A block, and those that follow it."""
        gone = [block] if block.is_alive else []
        while gone:
            block = gone.pop()
            gone += block.children
            block.is_alive = False
            del self.blocks[block.key]
            if block.parent is not None:
                block.parent.children.discard(block)
            for pages, page in self._held(block):
                pages.cached[page] -= 1
                pages.drop(page)

    def _held(self, block: Block) -> list[tuple[Pages, int]]:
        return [
            (table.pages, page)
            for table, pages in zip(self.store.tables(0), block.pages, strict=True)
            for page in pages
        ]

    def _touch(self, chain: list[Block]) -> None:
        """Now the most recently used; a block after those that follow it, which go first."""
        for block in reversed(chain):
            self.blocks.move_to_end(block.key)


def _root(request: Request) -> tuple:
    """Before the first block: what else the rows depend on."""
    return ("options", request.depth, request.threshold)


def _pages(chain: list[Block], table: int, size: int) -> list[int]:
    """Pages of one table at the end of a chain. A block that goes on in its parent's last page has that page, too."""
    pages: list[int] = []
    rows = 0
    for block in chain:
        if block.pages[table]:
            pages[rows // size :] = block.pages[table]
        rows = block.counts[table]
    return pages
