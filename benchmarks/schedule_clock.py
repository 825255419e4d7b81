"""A clock for pipeline schedules: every chunk takes a set time, and the clock records which rank ran which chunk when.

A machine with fewer cores than pipeline ranks cannot show that stages overlap, because they take turns on the cores.
Under this clock, a chunk sleeps until its set time is over, which releases the core. If the model is small enough for
its computation to fit into that time, idle time comes from the schedule and not from the machine. The schedule, the
messages and the process groups are the real ones; the package does not know about the clock.
"""

from __future__ import annotations

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from megatron.core.pipeline_parallel import schedules
from tied_pipeline import around_instruction
from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Event:
    """One chunk of one micro-batch on one rank."""

    rank: int
    """Pipeline rank."""
    kind: str
    """FORWARD or BACKWARD."""
    microbatch: int
    chunk: int
    """Virtual stage; in the ring, the recursion."""
    start: float
    """Seconds on the clock that all processes of a machine share."""
    end: float
    computed: float
    """Seconds of [start, end] that were real work; the rest was slept."""
    message: tuple[int, ...] | None
    """Shape of the output of a forward chunk; None for a loss."""


class Clock:
    """Pads chunks to a constant time and records them.

    Args:
        rank: pipeline rank of this process.
        forward: seconds of a forward chunk; 0 records without padding.
        backward: seconds of a backward chunk.
    """

    def __init__(self, rank: int, forward: float, backward: float):
        self.rank = rank
        self.seconds = {FORWARD: forward, BACKWARD: backward}
        self.events: list[Event] = []

    @contextlib.contextmanager
    def on_megatron(self) -> Iterator[Clock]:
        """Install the clock in Megatron-core's schedules for the duration of the block."""
        forward_step, backward_step = schedules.forward_step, schedules.backward_step
        running: dict[int, tuple[int, int]] = {}

        def forward(*args, **kwargs):
            place = kwargs["current_microbatch"], kwargs.get("vp_stage") or 0
            result = self._timed(FORWARD, place, lambda: forward_step(*args, **kwargs), lambda r: _first(r[0]))
            # The schedule keeps the output until its backward pass, so its id is not reused.
            running[id(_first(result[0]))] = place
            return result

        def backward(input_tensor, output_tensor, *args, **kwargs):
            place = running.pop(id(_first(output_tensor)))
            return self._timed(BACKWARD, place, lambda: backward_step(input_tensor, output_tensor, *args, **kwargs))

        schedules.forward_step, schedules.backward_step = forward, backward
        try:
            yield self
        finally:
            schedules.forward_step, schedules.backward_step = forward_step, backward_step

    @contextlib.contextmanager
    def on_deepspeed(self) -> Iterator[Clock]:
        """Install the clock in DeepSpeed's pipeline engine for the duration of the block."""
        done = {FORWARD: 0, BACKWARD: 0}

        def timed(kind: str) -> Callable:
            def wrap(original: Callable) -> Callable:
                def instruction(engine, buffer_id):
                    place = done[kind] % engine.micro_batches, 0
                    done[kind] += 1  # both directions take micro-batches in order
                    self._timed(
                        kind,
                        place,
                        lambda: original(engine, buffer_id),
                        lambda _: None if engine.is_last_stage() else engine.pipe_buffers["outputs"][buffer_id],
                    )

                return instruction

            return wrap

        with (
            around_instruction(deepspeed_schedule.ForwardPass, timed(FORWARD)),
            around_instruction(deepspeed_schedule.BackwardPass, timed(BACKWARD)),
        ):
            yield self

    def _timed(self, kind: str, place: tuple[int, int], work: Callable, message: Callable = lambda _: None):
        start = time.perf_counter()
        result = work()
        computed = time.perf_counter() - start
        time.sleep(max(0.0, self.seconds[kind] - computed))
        sent = message(result)
        shape = tuple(sent.shape) if isinstance(sent, Tensor) and sent.ndim > 0 else None
        self.events.append(Event(self.rank, kind, *place, start, time.perf_counter(), computed, shape))
        return result


def iterations(events: list[Event]) -> list[list[Event]]:
    """One rank's events, divided into iterations where a (kind, micro-batch, chunk) recurs."""
    result, seen = [], set()
    for event in events:
        key = (event.kind, event.microbatch, event.chunk)
        if not result or key in seen:
            result.append([])
            seen = set()
        result[-1].append(event)
        seen.add(key)
    return result


def idle_shares(events: list[Event]) -> dict[int, float]:
    """The fraction of one iteration, first start to last end on any rank, in which each rank ran no chunk."""
    span = max(event.end for event in events) - min(event.start for event in events)
    ranks = sorted({event.rank for event in events})
    busy = {rank: sum(event.end - event.start for event in events if event.rank == rank) for rank in ranks}
    return {rank: 1.0 - busy[rank] / span for rank in ranks}


def overruns(events: list[Event], forward: float, backward: float) -> int:
    """Chunks whose real work did not fit into the set time; if there are any, idle shares mean little."""
    limit = {FORWARD: forward, BACKWARD: backward}
    return sum(event.computed > limit[event.kind] for event in events)


def _first(tensors):
    return tensors[0] if isinstance(tensors, (list, tuple)) else tensors
