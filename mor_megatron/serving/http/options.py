"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.recursion.setting import check, setting


@dataclass(frozen=True)
class ServerOptions:
    """Settings of the server; those of the engine are `serving.EngineOptions`.

    Raises:
        ValueError: a value is out of range.
    """

    name: str = "mor"
    """Of the model, in requests and answers."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine's."""
    port: int = setting(8000, least=0, most=65535)
    """0: any free one."""
    api_key: str | None = None
    """What clients must send as bearer token; None: nothing."""
    max_waiting: int = setting(256, least=0)
    """Most requests that wait for a lane; more are refused with status 429."""
    max_logprobs: int = setting(20, least=0)
    """Most likely tokens that a request may ask for at each position."""
    max_body_size: int = setting(8 << 20, least=1)
    """Most bytes of a request's body."""
    receive_timeout: int = setting(60, least=1)
    """Seconds in which the body of a request must arrive; then it is refused with status 408."""
    send_timeout: int = setting(60, least=1)
    """Seconds in which a client takes nothing of its answer, before its connection is closed; on Linux."""
    shutdown_timeout: int = setting(60, least=0)
    """Seconds that open requests have to end after SIGTERM; then they end with an error."""

    def __post_init__(self):
        check(self, dashes=False)
