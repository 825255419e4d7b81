"""The server as replicas under Ray Serve: they are added, killed, broken and drained while clients wait for streams."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from http_server import model_of, tokenizer

from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.run import bind

ROOT = Path(__file__).parents[3]
FAULT = """
from pathlib import Path
from mor_megatron.serving.engine import Engine

fault, step = Path(__file__).with_name("fault"), Engine.step

def failing(self):
    if fault.exists():
        fault.unlink()
        raise RuntimeError("planted")
    step(self)

Engine.step = failing
"""
"""Read as an extension by every replica: the first one that takes a step once the file is there fails."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs requirements-ray.txt"),
]


@dataclass(frozen=True)
class Replicas:
    """A running `ray_app.py`, with one or two replicas of two lanes."""

    process: subprocess.Popen
    client: openai.OpenAI
    fault: Path

    def pids(self) -> set[int]:
        """Of the replicas."""
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "ServeReplica" in process.cmdline()[0]:
                    found.add(process.pid)
        return found

    def stream(self, started: Callable[[], object] = lambda: None) -> str | None:
        """Finish reason of a long stream; None: it ended without one.

        Raises:
            openai.APIError: it broke off.
        """
        reason = None
        for chunk in self.client.completions.create(model="tiny", prompt="once", max_tokens=800, stream=True):
            started()
            reason = chunk.choices[0].finish_reason
        return reason

    @contextmanager
    def load(self, clients: int = 6) -> Iterator[list[Exception]]:
        """Short requests, one after another from each client; yields their errors."""
        errors: list[Exception] = []
        is_over = threading.Event()

        def work() -> None:
            while not is_over.is_set():
                try:
                    self.client.completions.create(model="tiny", prompt="once", max_tokens=100)
                except openai.APIError as error:
                    errors.append(error)

        with ThreadPoolExecutor(clients) as pool:
            for _ in range(clients):
                pool.submit(work)
            try:
                yield errors
            finally:
                is_over.set()

    def wait_for_another(self, before: set[int]) -> None:
        """Wait until there are two replicas, of which one was there before."""
        deadline = time.monotonic() + 150
        while len(self.pids()) != 2 or len(self.pids() & before) != 1:
            assert time.monotonic() < deadline, "there is no other replica"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[Replicas]:
    """Begins with one replica."""
    directory = tmp_path_factory.mktemp("ray")
    model_of("expert", max_position_embeddings=2048).save_pretrained(directory / "tiny")
    tokenizer().save_pretrained(directory / "tiny")
    (directory / "fault.py").write_text(FAULT)
    with bind(ServerOptions(port=0)) as bound:
        port = bound.getsockname()[1]
    command = [sys.executable, ROOT / "examples/serving/ray_app.py", "--model", directory / "tiny", "--port", port]
    command += ["--min-replicas", 1, "--max-replicas", 2, "--cpus-per-replica", 0.5, "--max-num-seqs", 2]
    command += ["--device", "cpu", "--extension", directory / "fault.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(directory), "OMP_NUM_THREADS": "1"}
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while "serving tiny" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                yield Replicas(process, client, directory / "fault")
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.timeout(400)
def test_a_replica_is_added_when_requests_wait(replicas: Replicas):
    before = replicas.pids()
    assert len(before) == 1
    with replicas.load() as errors:
        replicas.wait_for_another(before)
    assert errors == []


@pytest.mark.timeout(400)
def test_a_killed_replica_is_restarted(replicas: Replicas):
    """Its streams end with an error, the others are whole, and what comes next is answered."""
    before = replicas.pids()
    assert len(before) == 2
    started = threading.Barrier(9)
    with ThreadPoolExecutor(8) as pool:

        def one() -> str | None:
            first = iter([started.wait])
            return replicas.stream(lambda: next(first, lambda: None)())

        streams = [pool.submit(one) for _ in range(8)]
        started.wait(60)
        os.kill(min(before), signal.SIGKILL)
        for _ in range(10):
            assert replicas.client.completions.create(model="tiny", prompt="a", max_tokens=3).choices
        errors = [stream.exception() for stream in streams]
    broken = [error for error in errors if error is not None]
    assert all(isinstance(error, openai.APIConnectionError) for error in broken)
    assert 2 <= len(broken) <= 6, "the streams were not spread over both replicas"
    assert {stream.result() for stream in streams if stream.exception() is None} == {"length"}
    replicas.wait_for_another(before)


@pytest.mark.timeout(400)
def test_a_replica_whose_engine_fails_is_replaced(replicas: Replicas):
    before = replicas.pids()
    assert len(before) == 2
    with replicas.load() as errors:
        replicas.fault.touch()
        replicas.wait_for_another(before)
    assert errors
    assert all(isinstance(error, openai.InternalServerError | openai.APIConnectionError) for error in errors)
    assert any(re.search("engine has failed", str(error)) for error in errors)
    assert replicas.client.completions.create(model="tiny", prompt="a", max_tokens=3).choices


@pytest.mark.timeout(400)
def test_sigterm_drains(replicas: Replicas):
    """The last test: the replicas end."""
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(replicas.stream, started.set)
        started.wait(60)
        replicas.process.terminate()
        assert stream.result() == "length"
    assert replicas.process.wait(60) == 0
