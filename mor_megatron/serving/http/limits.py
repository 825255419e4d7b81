"""What a client may not exceed before its request is read."""

from __future__ import annotations

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
