"""A server in a process of its own: signals, and the end."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from http_server import engine_of

from mor_megatron.serving.http import run
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.run import EXIT_INTERRUPTED, Server, bind, serve


def _serve(pipe, **options) -> None:
    """A server that may have few open files, as many shells allow."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))

    def tell(options: ServerOptions) -> socket.socket:
        bound = bind(options)
        bound.listen()
        pipe.send(bound.getsockname()[1])
        return bound

    run.bind = tell  # this process is for nothing else
    os._exit(run.serve(engine_of, ServerOptions(name="tiny", port=0, **options)))


@contextmanager
def forked(**options) -> Iterator[tuple[multiprocessing.Process, str]]:
    """A server in a process of its own, and its address."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), kwargs=options)
    process.start()
    try:
        yield process, f"http://127.0.0.1:{ours.recv()}"
        process.join(30)
    finally:
        process.kill()
        process.join()


@pytest.fixture
def stream_body() -> dict:
    return {"prompt": "once", "max_tokens": 200, "stream": True}


def test_sigterm_drains(stream_body: dict):
    """An open request ends as it would have, whatever further signals come; a new one is not taken; the exit status is
    0. Connections that do nothing are in nobody's way."""
    with forked() as (process, url), httpx.Client(base_url=url, timeout=60) as http, ExitStack() as idle:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(150):
            idle.enter_context(socket.create_connection(address))
        with http.stream("POST", "/v1/completions", json=stream_body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    assert process.exitcode == 0


@pytest.mark.timeout(60)
def test_a_taken_address_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"host=127.0.0.1 port={port}: Address already in use"):
            serve(lambda: pytest.fail("loaded"), ServerOptions(port=port))


def test_a_signal_before_the_server_listens_to_signals(monkeypatch):
    """It is not lost."""
    start = Server.run

    def interrupted(self: Server, **options) -> None:
        signal.raise_signal(signal.SIGTERM)
        start(self, **options)

    monkeypatch.setattr(Server, "run", interrupted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert serve(engine_of, ServerOptions(port=0)) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_those_who_wait_too_long_for_the_end_are_told(stream_body: dict):
    """In a stream, and in place of a whole answer."""
    with forked(shutdown_timeout=1) as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        with (
            ThreadPoolExecutor() as pool,
            http.stream("POST", "/v1/completions", json={**stream_body, "max_tokens": 2000}) as answer,
        ):
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            whole = pool.submit(http.post, "/v1/completions", json={"prompt": "once", "max_tokens": 2000})
            next(itertools.islice(lines, 20, None))  # the second request has come, too
            os.kill(process.pid, signal.SIGTERM)
            *_, last = lines
        for error in (json.loads(last.removeprefix("data: "))["error"], whole.result().json()["error"]):
            assert (error["code"], error["type"]) == (503, "server_error")
            assert "shutting down" in error["message"]
    assert process.exitcode == 0


def test_a_second_sigint_ends_at_once(stream_body: dict, capfd):
    """In the midst of a stream, and without a word."""
    with forked() as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json={**stream_body, "max_tokens": 2000}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            for _ in range(2):
                next(lines)
                os.kill(process.pid, signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        process.join(30)
        assert process.exitcode == EXIT_INTERRUPTED
    assert capfd.readouterr().err == ""


def test_a_body_that_still_arrives_at_the_end_is_refused(monkeypatch, capfd):
    """In the form of all errors; uvicorn would answer in plain text, and print where it was."""
    monkeypatch.setattr(run, "_LAST_WORDS", 1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with forked(shutdown_timeout=0) as (process, url), socket.socket() as slow:
        slow.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        slow.sendall(head)
        assert httpx.get(f"{url}/health").status_code == 200  # the head has arrived before
        os.kill(process.pid, signal.SIGTERM)
        slow.settimeout(30)
        answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert process.exitcode == 0
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"shutting down: try again later" in answer
    assert "Traceback" not in capfd.readouterr().err
