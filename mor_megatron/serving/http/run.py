"""The process: listen, serve, and drain on SIGTERM."""

from __future__ import annotations

import logging
import signal
import socket

import uvicorn

from mor_megatron.serving.engine import Engine
from mor_megatron.serving.http.app import build_app
from mor_megatron.serving.http.options import ServerOptions

logger = logging.getLogger(__name__)


def build_server(engine: Engine, options: ServerOptions) -> uvicorn.Server:
    """A server that stops when told to by SIGTERM or SIGINT, or when the engine has failed."""

    def stop() -> None:
        server.should_exit = True

    server = uvicorn.Server(
        uvicorn.Config(
            build_app(engine, options, stop),
            log_level="warning",
            timeout_graceful_shutdown=options.shutdown_timeout,
        )
    )
    return server


def listen(options: ServerOptions) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    return socket.create_server((options.host, options.port), family=family, backlog=2048)


def serve(engine: Engine, options: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT. Then take no new connection, and end when the open requests have ended.

    Returns:
        Exit status: 0, or 1 if the engine has failed.
    Raises:
        OSError: the address is taken, or not this machine's.
    """
    with listen(options) as bound:
        host, port = bound.getsockname()[:2]
        if options.api_key is None and host not in ("127.0.0.1", "::1"):
            logger.warning(f"host={host} is open to other machines, and there is no API key")
        print(f"serving {options.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server = build_server(engine, options)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has drained
            signal.signal(number, lambda *_: None)
        server.run(sockets=[bound])
    return 0 if server.config.app.state.service.worker.is_alive else 1
