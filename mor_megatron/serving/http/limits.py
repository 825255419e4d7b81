"""What bounds a single client and all connections."""

from __future__ import annotations

import resource
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor_megatron.serving.http.errors import ApiError


class BodyLimit:
    """Refuses larger bodies while they arrive. Starlette's own limit answers in plain text.

    Args:
        app: that reads the body.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_part() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise ApiError(f"body is larger than {self.most} bytes: send less at a time", 413, "body")
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
