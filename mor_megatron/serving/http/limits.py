"""What bounds a single client and all connections."""

from __future__ import annotations

import asyncio
import resource
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor_megatron.serving.http.errors import ApiError, in_words
from mor_megatron.serving.http.worker import ShuttingDown


class BodyLimit:
    """Refuses bodies that are too large, or do not end in time, while they arrive.

    Starlette's own limit answers in plain text, and neither Starlette nor uvicorn limits the time.

    Args:
        app: that reads the body.
        most: bytes.
        seconds: from the head of a request to the end of its body.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: int):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        size, is_whole, deadline = 0, False, clock() + self.seconds

        async def receive_part() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # the end of the connection
            try:
                message = await asyncio.wait_for(receive(), deadline - clock())
            except asyncio.TimeoutError:
                raise ApiError(f"body has not arrived within {self.seconds} s: send it faster", 408, "body") from None
            except asyncio.CancelledError:  # the server ends
                raise ApiError(*in_words(ShuttingDown())) from None
            size += len(message.get("body", b""))
            if size > self.most:
                raise ApiError(f"body is larger than {self.most} bytes: send less at a time", 413, "body")
            is_whole = not message.get("more_body", False)
            return message

        await self.app(scope, receive_part, send)


def raise_file_limit() -> None:
    """Let the process have as many open connections as the system allows it: many shells set 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def drop_silent(listener: socket.socket, seconds: int) -> None:
    """Close connections whose client has not taken anything for some time while there was something to take.

    Such a client keeps the place of its request. The kernel notices, and new connections inherit the option.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
