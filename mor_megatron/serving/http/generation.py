"""From the body of a request to its answer: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mor_megatron.serving.http.choices import Choice, usage
from mor_megatron.serving.http.errors import as_json, in_words
from mor_megatron.serving.http.protocol import Body
from mor_megatron.serving.http.worker import Call, Unavailable
from mor_megatron.serving.request import Event


class Generation:
    """One answer.

    Args:
        name: of the model.
        body: of the request.
        call: the requests of the engine.
        choices: one for each of these.
    """

    def __init__(self, name: str, body: Body, call: Call, choices: list[Choice]):
        self.name, self.body, self.call, self.choices = name, body, call, choices
        self.id, self.created = f"{choices[0].prefix}-{uuid.uuid4().hex}", int(time.time())

    async def answer(self, http: Request) -> Response:
        """The answer; if the client goes away before its end, what still runs is cancelled."""
        if self.body.stream:
            return _Stream(self.call, self._parts())
        work, gone = asyncio.ensure_future(self._whole()), asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=499)
        finally:
            self.call.close()
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Unavailable):
                    await task

    async def _whole(self) -> dict[str, Any]:
        events: list[list[Event]] = [[] for _ in self.choices]
        async for index, event in self.call.events():
            events[index].append(event)
        found = [choice.take(own) for choice, own in zip(self.choices, events, strict=True)]
        return self._object(self.choices[0].kind, found) | {"usage": self._usage()}

    async def _parts(self) -> AsyncIterator[str]:
        """Chunks, as server-sent events. An error ends the stream with a chunk of its own."""
        kind = self.choices[0].chunk_kind
        try:
            async for index, event in self.call.events():
                yield _event(self._object(kind, [self.choices[index].take([event])]))
        except Unavailable as error:
            yield _event(as_json(*in_words(error)))
            return
        if self.body.sends_usage:
            yield _event(self._object(kind, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _object(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        return usage(self.call.requests, self.body.n)


class _Stream(StreamingResponse):
    """A stream of the events of a call."""

    def __init__(self, call: Call, parts: AsyncIterator[str]):
        super().__init__(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.call = call

    async def __call__(self, *args) -> None:
        try:
            await super().__call__(*args)
        finally:  # not in the generator: one that was never begun is never ended
            self.call.close()


async def _gone(http: Request) -> None:
    """Wait until the client closes the connection. The body has been read, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
