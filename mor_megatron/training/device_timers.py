"""Megatron-core's timers in a GPU's own time. Megatron-core's own wait for the GPU at both ends of a section."""

from __future__ import annotations

import torch
from megatron.core.timers import Timer, Timers


class DeviceTimers(Timers):
    """Timers that only put marks into the GPU's queue, until one is read."""

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        if name not in self._timers:
            self._timers[name], self._log_levels[name] = _DeviceTimer(name), self._max_log_level
        return super().__call__(name, log_level)


class _DeviceTimer(Timer):
    def __init__(self, name: str):
        super().__init__(name)
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """Begin and end of what has not been added up."""

    def start(self, barrier: bool = False) -> None:
        assert not self._started
        self._started, self._begin = True, _mark()

    def stop(self, barrier: bool = False) -> None:
        assert self._started
        self._started = False
        self._spans.append((self._begin, _mark()))

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        self._add_up()
        return super().elapsed(reset, barrier)

    def active_time(self) -> float:
        self._add_up()
        return super().active_time()

    def _add_up(self) -> None:
        """Wait for the last mark, and add the time of all sections that it ends."""
        assert not self._started
        if self._spans:
            self._spans[-1][1].synchronize()
        seconds = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        self._spans = []
        self._elapsed += seconds
        self._active_time += seconds


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
