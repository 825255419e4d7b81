"""Whatever happens to a rank, the others end and name it. Real processes over gloo, of torch alone."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LIMIT = 90.0  # seconds until a rank counts as hung; 15 are the rule


@contextlib.contextmanager
def ranks(count: int, fate: str, victim: int) -> Iterator[list[subprocess.Popen]]:
    """Worker processes without a launcher, which would end the others itself; none survives the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | shared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "lost_rank_worker.py"), fate, str(victim)]
    processes = []
    try:
        for rank in range(count):
            processes.append(
                subprocess.Popen(
                    command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def errors(processes: list[subprocess.Popen], victim: int) -> list[str]:
    """Wait for all but the victim, which must fail; the lines that they report."""
    reports = []
    for rank, process in enumerate(processes):
        if rank != victim:
            text = process.communicate(timeout=LIMIT)[1].decode()
            assert process.returncode == 1, f"rank {rank}: {text}"
            assert "Traceback" not in text
            reports += [line for line in text.splitlines() if line.startswith("error: ")]
    return reports


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_the_lost_rank_is_named_once(fate):
    with ranks(4, fate, victim=2) as processes:
        (report,) = errors(processes, victim=2)
        pid = processes[2].pid
    assert re.match(rf"error: lost rank 2 \(\S+, process {pid}\) of 4; rank [013]: ", report)
    if fate == "stopped":
        assert "Timed out" in report


def test_the_host_of_the_store_is_named():
    with ranks(2, "killed", victim=0) as processes:
        (report,) = errors(processes, victim=0)
    assert report.startswith("error: lost rank 0, which hosts the rendezvous store; rank 1: ")


def test_a_rank_that_lives_and_does_not_come_is_not_called_lost():
    with ranks(2, "sleeps", victim=1) as processes:
        (report,) = errors(processes, victim=1)
        assert processes[1].wait(LIMIT) == 1, "it ends with the others"
    assert report.startswith("error: an exchange failed although all 2 ranks are alive: ")


def test_without_a_loss_nothing_is_said():
    with ranks(2, "nothing", victim=0) as processes:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
    assert b"TCPStore" not in b"".join(stream for output in outputs for stream in output)
