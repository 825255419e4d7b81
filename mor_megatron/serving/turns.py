"""When a turn runs: how many sequences should wait for it.

Waiting saves turns and costs passes. What matters is what a pass and a turn cost however few rows they have: the `a` of
a + b n seconds for n rows. Both are estimated while the engine runs, and so is the fraction of rows that leave after
each recursion. A simulation of many sequences then gives passes and turns per token for several numbers that wait, and
the one with the least a_pass * passes + a_turn * turns is taken. Tokens do not depend on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

SHARES = np.arange(8, 0, -1) / 8
"""Of the running sequences, that may have to wait; among equally good ones the first is taken."""
TRIAL = 16
"""Turns that try all shares in turn, so that costs are seen at several numbers of rows."""
EVERY = 64
"""Turns between two choices."""
STEPS = 32
"""Passes of the simulation: many more than recursions."""
FADE = 0.99
"""Weight of all that was observed, with every observation."""


class Cost:
    """Seconds for n rows, a + b n: a least-squares fit in which old observations fade."""

    def __init__(self):
        self._sums = np.zeros(5)

    def add(self, rows: int, seconds: float) -> None:
        """One observation."""
        self._sums = FADE * self._sums + (1.0, rows, rows * rows, seconds, rows * seconds)

    @property
    def line(self) -> tuple[float, float]:
        """a and b, neither of them negative; all of it is a while one number of rows is all that was seen."""
        count, n, nn, t, nt = self._sums
        spread = count * nn - n * n
        if count == 0 or spread <= 1e-6 * nn:
            return (t / count if count else 0.0), 0.0
        b = min(max((count * nt - n * t) / spread, 0.0), t / n)
        return (t - b * n) / count, b


class Turns:
    """Says when a turn is due.

    Args:
        turn_at: sequences that must wait for one; None: automatic.
        recursions: Nr.
    """

    def __init__(self, turn_at: int | None, recursions: int):
        self.turn_at, self.share = turn_at, 0.5
        self.of_pass, self.of_turn = Cost(), Cost()
        self._active = np.ones(recursions)
        """Rows seen at each recursion, fading."""
        self._count = itertools.count(1)

    def is_due(self, waiting: int, running: int) -> bool:
        """Whether so many sequences, of those that run or wait, are enough for a turn."""
        return waiting >= (self.turn_at or max(1.0, self.share * running))

    def saw_pass(self, rows: int, seconds: float) -> None:
        """A pass over single rows."""
        self.of_pass.add(rows, seconds)

    def saw_turn(self, rows: int, seconds: float, depths: Iterable[int]) -> None:
        """A turn of single rows.

        Args:
            depths: of the rows that left.
        """
        self.of_turn.add(rows, seconds)
        self._active *= FADE**rows
        for depth in depths:
            self._active[:depth] += 1.0
        number = next(self._count)
        if number <= TRIAL:
            self.share = float(SHARES[3 * number % len(SHARES)])
        if number == TRIAL or number % EVERY == 0:
            self.share = best_share(self.of_pass.line[0], self.of_turn.line[0], self._active)


def best_share(pass_cost: float, turn_cost: float, active: np.ndarray) -> float:
    """The share of the running sequences that should wait for a turn.

    Args:
        pass_cost, turn_cost: what does not depend on the number of rows.
        active: rows at each recursion, [Nr].
    """
    staying = active[1:] / np.maximum(active[:-1], 1e-9)  # nothing may have been there for long
    passes, turns = simulate(SHARES, 1.0 - np.append(staying, 0.0))
    return float(SHARES[np.argmin(pass_cost * passes + turn_cost * turns)])


def simulate(shares: np.ndarray, leaving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Passes and turns per token of all sequences, if a share of them has to wait for a turn, [shares] each.

    Args:
        leaving: fraction of the rows of each recursion that leave the block after it, [Nr].
    """
    inside, waiting = np.zeros((len(shares), len(leaving))), np.ones(len(shares))
    turns, tokens = np.zeros((2, len(shares)))
    for _ in range(STEPS):
        entering = np.where((waiting >= shares) | ~inside.any(1), waiting, 0.0)
        turns, tokens, waiting = turns + (entering > 0), tokens + entering, waiting - entering
        inside[:, 0] += entering
        left = inside * leaving
        waiting, inside = waiting + left.sum(1), np.roll(inside - left, 1, axis=1)
    return STEPS / tokens, turns / tokens
