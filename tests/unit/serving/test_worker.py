"""Requests that come while the engine's thread ends: each is told, and none waits for ever."""

from __future__ import annotations

import asyncio
import threading

import pytest
from serving_models import model_of

from mor_megatron.serving import Engine, EngineOptions, SamplingParams
from mor_megatron.serving.http.worker import Call, ShuttingDown, Worker

PARAMS = SamplingParams(max_tokens=2)


def started() -> Worker:
    worker = Worker(Engine(model_of("expert"), None, EngineOptions(lanes=2)), lambda: lambda event: None, limit=8)
    worker.start()
    return worker


async def outcome(call: Call) -> str:
    """How a call ends; it must."""
    try:
        async for _, event in call.events():
            if event.finish_reason is not None:
                return event.finish_reason
    except ShuttingDown:
        return "told"
    return "nothing"


def test_a_request_is_served():
    async def submit() -> str:
        worker = started()
        found = await asyncio.wait_for(outcome(worker.submit([[1, 2]], [PARAMS])), 30)
        await asyncio.to_thread(worker.stop)
        return found

    assert asyncio.run(submit()) == "length"


@pytest.mark.parametrize("before_it_is_taken", [True, False])
def test_a_request_as_the_worker_stops(monkeypatch, before_it_is_taken: bool):
    """The worker stops in another thread, and is done, at the worst moment: as the engine looks at the request."""

    async def submit() -> str:
        worker = started()
        take = worker.engine.add if before_it_is_taken else worker.engine._inbox.append

        def stop_first(*args):
            stopping = threading.Thread(target=worker.stop)
            stopping.start()
            stopping.join()
            return take(*args)

        if before_it_is_taken:
            monkeypatch.setattr(worker.engine, "add", stop_first)
        else:
            monkeypatch.setattr(worker.engine, "_inbox", Inbox(stop_first))
        try:
            call = worker.submit([[1, 2]], [PARAMS])
        except ShuttingDown:
            return "refused"
        return await asyncio.wait_for(outcome(call), 5)

    assert asyncio.run(submit()) == ("refused" if before_it_is_taken else "told")


class Inbox:
    """Empty until something is appended, which is done elsewhere."""

    def __init__(self, append):
        self.append = append

    def __len__(self) -> int:
        return 0
