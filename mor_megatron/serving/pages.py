"""Pages of keys and values, and the tables that say which of them a sequence has.

A page has room for a number of rows in each layer of a kind. There are two kinds: the layers of the shared block, where
a sequence has one table for each recursion, with the rows of exactly the tokens that were active there; and the layers
that run once, where it has one table. If recursions share keys and values, all of them read the table of recursion 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


class Pages:
    """Block manager of one kind of layers.

    Page 0 belongs to nobody, and neither does the last table, which begins with it. Rows whose sequence has left the
    engine write there.

    Args:
        layers: positions of this kind, those of the block in recursion 0; without any, no page is ever needed.
        tables: number of tables that sequences can have.
        longest: most rows of a table.
        count: pages there are.
        size: rows of a page.
        like: gives heads, width, type and device, [.., G, D].
    """

    def __init__(self, layers: set[int], tables: int, longest: int, count: int, size: int, like: Tensor):
        self.size, self.count, self.layers = size, count, layers
        shape = ((count + 1) * size, *like.shape[-2:])
        # Zeros: a masked row still enters products, and must be finite.
        self.keys = {layer: like.new_zeros(shape) for layer in layers}
        self.values = {layer: like.new_zeros(shape) for layer in layers}
        self.table = np.zeros((tables + 1, -(-longest // size)), np.int32)
        """[tables, pages]: page numbers."""
        self.rows = np.zeros(tables + 1, np.int64)
        """[tables]: rows in use."""
        self.held = np.zeros(tables + 1, np.int64)
        """[tables]: pages in use."""
        self.references = np.zeros(count + 1, np.int32)
        """[pages]: tables and cached blocks that have each page."""
        self.cached = np.zeros(count + 1, np.int32)
        """[pages]: cached blocks among these."""
        self.free = list(range(count, 0, -1))
        self.most = 0
        """Most pages that were in use at one time."""

    @property
    def used(self) -> int:
        """Pages that are not free."""
        return self.count - len(self.free)

    def reclaimable(self) -> int:
        """Pages that only the prefix cache has."""
        return int(((self.cached > 0) & (self.references == self.cached)).sum())

    def needed(self, rows: int | np.ndarray) -> int | np.ndarray:
        """Pages for so many rows of one table."""
        return -(-rows // self.size) if self.layers else 0 * rows

    def missing(self, tables: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
        """Pages that tables lack for so many more rows each."""
        return np.maximum(0, self.needed(self.rows[tables] + rows) - self.held[tables])

    def grow(self, table: int, pages: int) -> None:
        """Give a table so many more pages, which must be free."""
        for _ in range(pages):
            self.append(table, self.take())

    def take(self) -> int:
        """A free page, for one table."""
        page = self.free.pop()
        self.references[page] = 1
        self.most = max(self.most, self.used)
        return page

    def append(self, table: int, page: int) -> None:
        """Put a page at the end of a table, which is among its references already."""
        self.table[table, self.held[table]] = page
        self.held[table] += 1

    def hold(self, page: int) -> None:
        """One more has the page."""
        self.references[page] += 1

    def drop(self, page: int) -> None:
        """One fewer has the page."""
        self.references[page] -= 1
        if self.references[page] == 0:
            self.free.append(page)

    def release(self, table: int) -> None:
        """Empty a table."""
        for page in self.table[table, : self.held[table]].tolist():
            self.drop(page)
        self.table[table, : self.held[table]] = 0
        self.rows[table] = self.held[table] = 0

    def copy(self, source: int, target: int) -> None:
        """All rows of a page."""
        old, new = (slice(page * self.size, (page + 1) * self.size) for page in (source, target))
        for buffer in (*self.keys.values(), *self.values.values()):
            buffer[new] = buffer[old]

    def places(self, table: int, rows: int) -> np.ndarray:
        """Where the first rows of a table lie in the buffers, [rows]."""
        pages = self.table[table, : -(-rows // self.size)].astype(np.int64)
        return (pages[:, None] * self.size + np.arange(self.size)).reshape(-1)[:rows]


@dataclass(frozen=True)
class Table:
    """One table of a sequence."""

    pages: Pages
    index: int
    recursion: int
    """It has the rows of tokens that passed this recursion; -1 and 0: of all."""


class Store:
    """All keys and values.

    Args:
        ends: of the layers that run once.
        block: of the shared block.
        recursions: tables of a sequence in the block.
    """

    def __init__(self, ends: Pages, block: Pages, recursions: int):
        self.ends, self.block, self.recursions = ends, block, recursions

    @property
    def kinds(self) -> tuple[Pages, Pages]:
        return self.ends, self.block

    def tables(self, slot: int) -> Iterator[Table]:
        """Those of the sequence in a slot."""
        yield Table(self.ends, slot, -1)
        for r in range(self.recursions):
            yield Table(self.block, slot * self.recursions + r, r)

    def release(self, slot: int) -> None:
        """Give back all that the sequence in a slot has."""
        for table in self.tables(slot):
            table.pages.release(table.index)

    def tokens(self, fractions: Sequence[float]) -> int:
        """Tokens that there is room for, if so many of them pass each recursion."""
        share = sum(fractions[: self.recursions])
        return int(min(p.count * p.size / n for p, n in zip(self.kinds, (1, share), strict=True) if p.layers))

    def longest(self) -> int:
        """Tokens of one sequence that there is room for, if all of them pass all recursions."""
        return min(p.count // n * p.size for p, n in zip(self.kinds, (1, self.recursions), strict=True) if p.layers)

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        buffers = [x for pages in self.kinds for x in (*pages.keys.values(), *pages.values.values())]
        return sum(x.numel() * x.element_size() for x in buffers)


def build_store(
    ends: set[int],
    block: set[int],
    recursions: int,
    fractions: tuple[float, ...],
    lanes: int,
    longest: int,
    size: int,
    kv_bytes: int | None,
    like: Tensor,
) -> Store:
    """Keys and values for a number of sequences.

    Args:
        ends, block: positions of layers that run once, and of those of the block in recursion 0.
        recursions: tables of a sequence in the block.
        fractions: of tokens expected at each recursion; they divide the memory among the two kinds.
        lanes: sequences at a time.
        longest: tokens of a sequence.
        size: rows of a page.
        kv_bytes: memory for all pages; None: enough for all sequences at their longest.
        like: gives heads, width, type and device, [.., G, D].
    """
    per_table = -(-longest // size)
    counts = (lanes * per_table, lanes * recursions * per_table)
    if kv_bytes is not None:
        page = 2 * size * like.shape[-1] * like.shape[-2] * like.element_size()  # bytes, in one layer
        share = sum(fractions[:recursions])  # pages of the block for one page of the ends
        pages = kv_bytes / (page * (len(ends) + share * len(block)))
        counts = (int(pages), int(share * pages))
    tables = (lanes, lanes * recursions)
    kinds = zip((ends, block), tables, counts, strict=True)
    return Store(*(Pages(layers, n, longest, count, size, like) for layers, n, count in kinds), recursions)
