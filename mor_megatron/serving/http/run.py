"""The process: bind, load, serve, and drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from mor_megatron.serving.engine import Engine
from mor_megatron.serving.http.app import build_app
from mor_megatron.serving.http.limits import drop_silent, raise_file_limit
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.worker import Worker

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit status after a second SIGINT, as shells have it."""
_WAITING = 2048
"""Connections that wait to be accepted."""
_LAST_WORDS = 5
"""Seconds to send errors to those who still wait at the end."""


class Server(uvicorn.Server):
    """Stops when told to by SIGTERM or SIGINT, or when the engine has failed.

    Args:
        engine: that nobody else uses.
        options: of the server.
    """

    def __init__(self, engine: Engine, options: ServerOptions):
        self.options = options
        super().__init__(
            uvicorn.Config(
                build_app(engine, options, self.stop),
                log_level="warning",
                timeout_graceful_shutdown=options.shutdown_timeout + _LAST_WORDS,
            )
        )

    @property
    def worker(self) -> Worker:
        return self.config.app.state.service.worker

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        """On a signal. A second SIGINT ends the process at once: uvicorn would leave open requests in the midst of
        what they do, and print where."""
        if self.should_exit and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        super().handle_exit(number, frame)

    def stop(self) -> None:
        """Take no new connection, and end when the open requests have ended."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for open requests. Those that take too long are told: uvicorn itself would break their connections."""
        timer = asyncio.get_running_loop().call_later(self.options.shutdown_timeout, self.worker.give_up)
        await super().shutdown(sockets)
        timer.cancel()


def bind(options: ServerOptions) -> socket.socket:
    """A socket at the address, which does not listen yet.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not refused for connections of a server before
        drop_silent(bound, options.send_timeout)
        bound.bind((options.host, options.port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"host={options.host} port={options.port}: {error.strerror}") from error
    return bound


def serve(load: Callable[[], Engine], options: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT. Then take no new connection, and end when the open requests have ended.

    Args:
        load: called once the address is known to be free, as it may take minutes.
        options: of the server.
    Returns:
        Exit status: 0, or 1 if the engine has failed. A second SIGINT ends the process with `EXIT_INTERRUPTED`.
    Raises:
        OSError: the address is taken, or not this machine's.
    """
    raise_file_limit()
    with bind(options) as bound:
        engine = load()
        bound.listen(_WAITING)
        host, port = bound.getsockname()[:2]
        if options.api_key is None and host not in ("127.0.0.1", "::1"):
            logger.warning(f"host={host} is open to other machines, and there is no API key")
        print(
            f"KV cache: {engine.store.nbytes() / 2**20:,.1f} MiB, {engine.kv_tokens:,} tokens; "
            f"{engine.kv_tokens / engine.max_length:.2f} requests of {engine.max_length:,} tokens fit at once"
        )
        print(f"serving {options.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server = Server(engine, options)
        for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn listens to them, and when it raises them again
            signal.signal(number, lambda *_: server.stop())
        server.run(sockets=[bound])
    return 0 if server.worker.is_alive else 1
