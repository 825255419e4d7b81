"""Sections of an iteration, timed by Megatron-core's timers under Megatron-LM's names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.timers import Timers

IN_AN_ITERATION = ("batch-generator", "forward-backward", "all-grads-sync", "optimizer")
"""Waiting for data; forward and backward passes, in which ZeRO 2 and 3 reduce gradients; their reduction otherwise;
clipping, update, and with ZeRO the gathering of weights."""
BETWEEN = ("eval-time", "save-checkpoint")


class Sections:
    """Times what runs in `with sections(name)`; a section inside another interrupts it, so that nothing counts twice.

    Args:
        timers: where time is added up; None: nothing is timed.
    """

    names = (*IN_AN_ITERATION, *BETWEEN)

    def __init__(self, timers: Timers | None = None):
        self.timers = timers
        self._open: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as `name`, one of `names`."""
        assert name in self.names
        if self.timers is None:
            yield
            return
        if self._open:
            self.timers(self._open[-1]).stop()
        self._open.append(name)
        self.timers(name).start()
        try:
            yield
        finally:
            self.timers(name).stop()
            self._open.pop()
            if self._open:
                self.timers(self._open[-1]).start()


UNTIMED = Sections()
