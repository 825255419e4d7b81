"""The engine in a thread of its own, and the calls that wait for its events in asyncio's."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable

from mor_megatron.serving.engine import Engine
from mor_megatron.serving.request import Event, Request, SamplingParams

logger = logging.getLogger(__name__)

Observer = Callable[[Event], None]
"""Told of every event of a request, in the engine's thread."""


class Overload(Exception):
    """There are too many requests already."""


class Unavailable(Exception):
    """Nothing more will come."""


class EngineDied(Unavailable):
    """A step of the engine raised an error."""


class ShuttingDown(Unavailable):
    """The server ends, and the time for open requests is over."""


class Call:
    """The requests of one HTTP request, and their events. Used in the thread of the event loop.

    Args:
        worker: that runs them.
    """

    def __init__(self, worker: Worker):
        self.worker = worker
        self.requests: list[Request] = []
        self.open: set[int] = set()
        """Requests that have not ended."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | Unavailable] = asyncio.Queue()

    def add(self, prompt: list[int], params: SamplingParams) -> None:
        """One more request.

        Raises:
            ValueError: it does not fit the model or the engine.
        """
        index, observe = len(self.requests), self.worker.observer()

        def tell(event: Event) -> None:
            observe(event)
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.requests.append(self.worker.engine.add(prompt, params, tell))
        self.open.add(index)

    def fail(self, error: Unavailable) -> None:
        """Nothing more will come. Called in any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, error)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all requests, each with the index of its request, until all have ended.

        Raises:
            Unavailable: nothing more will come.
        """
        while self.open:
            entry = await self._events.get()
            if isinstance(entry, Unavailable):
                raise entry
            index, event = entry
            if event.finish_reason is not None:
                self.open.discard(index)
            yield entry

    def close(self) -> None:
        """Cancel what still runs: nobody waits for it any more."""
        for index in self.open:
            self.worker.engine.cancel(self.requests[index])
        self.worker.calls.discard(self)


class Worker:
    """Runs an engine.

    Args:
        engine: used by this thread alone from now on, but for `add`, `cancel`, `close` and `status`.
        observer: makes one for each request, when it arrives.
        limit: most requests that run and wait.
        on_death: called in the engine's thread after a step has raised an error.
    """

    def __init__(
        self, engine: Engine, observer: Callable[[], Observer], limit: int, on_death: Callable[[], None] | None = None
    ):
        self.engine, self.observer, self.limit, self.on_death = engine, observer, limit, on_death
        self.calls: set[Call] = set()
        self.is_alive = True
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Run the open requests to their ends, and take no more."""
        self._is_stopping = True
        self.engine.close()
        self._thread.join()

    def give_up(self) -> None:
        """Tell those who wait that the server ends, and take no more requests."""
        self._is_stopping = True
        self._fail(ShuttingDown())

    def submit(self, prompts: list[list[int]], params: list[SamplingParams]) -> Call:
        """All requests of a call, or none of them.

        Raises:
            ValueError: one does not fit the model or the engine.
            Overload: there are too many others.
            Unavailable: the engine runs no more, or soon will not.
        """
        if not self.is_alive:
            raise EngineDied
        if self._is_stopping:
            raise ShuttingDown
        if sum(len(call.open) for call in self.calls) + len(prompts) > self.limit:
            raise Overload
        call = Call(self)
        self.calls.add(call)
        try:
            for prompt, own in zip(prompts, params, strict=True):
                call.add(prompt, own)
        except ValueError:
            call.close()
            if self._is_stopping:  # and so the engine is closed
                raise ShuttingDown from None
            raise
        if not self.is_alive:  # it died in between, and may have missed this call
            call.fail(EngineDied())
        return call

    def _run(self) -> None:
        try:
            while self.engine.has_work or not self._is_stopping:
                if self.engine.has_work:
                    self.engine.step()
                else:
                    self.engine.wait()
            self._fail(ShuttingDown())  # who came too late for the last look at the inbox
        except Exception:
            logger.exception("the engine died")
            self.is_alive = False
            self._fail(EngineDied())
            if self.on_death is not None:
                self.on_death()

    def _fail(self, error: Unavailable) -> None:
        for call in tuple(self.calls):
            call.fail(error)
