"""Worker processes: they end with their rank and not before, and a rank with a GPU has some."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from itertools import islice
from multiprocessing.util import register_after_fork
from pathlib import Path

import pytest
import torch
from forkserver import fork_context

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.batch import Batch
from mor_megatron.data.datasets import build_batches
from mor_megatron.data.workers import number_of_workers

LIMIT = 60.0  # seconds until something counts as hung


class Counting(torch.utils.data.Dataset):
    """Sample i is i everywhere."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.full((4,), i), "labels": torch.full((4,), i + 1)}


@pytest.fixture
def loader():
    """Two samples a batch, by one worker."""
    return build_batches(Counting(), 0, 2, 0, 1, 2, DataConfig(num_workers=1))


def worker_of(batches) -> int:
    (worker,) = batches._workers
    return worker.pid


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_to_every_process_of_a_job_leaves_the_workers_alone(loader):
    """Also one with a thread that a library started in the fork."""
    register_after_fork(loader, lambda _: threading.Thread(target=time.sleep, args=(LIMIT,), daemon=True).start())
    batches = iter(loader)
    next(batches)
    subprocess.run(["kill", "-TERM", str(worker_of(batches))], check=True)
    seen = [batch.tokens[0, 0].item() for batch in islice(batches, 20)]
    assert seen == list(range(2, 42, 2))


def test_a_worker_ends_when_its_rank_says_so(loader):
    batches = iter(loader)
    next(batches)
    worker = batches._workers[0]
    worker.terminate()
    worker.join(LIMIT)
    assert worker.exitcode == 0


def test_workers_stay_for_later_iterations(loader):
    """An evaluation forks no process, and begins with the first batch however far the one before came."""
    seen = []
    for count in (3, 2):
        batches = iter(loader)
        seen.append((worker_of(batches), [batch.tokens[0, 0].item() for batch in islice(batches, count)]))
    assert seen == [(seen[0][0], [0, 2, 4]), (seen[0][0], [0, 2])]


def _die(sender) -> None:
    batches = iter(build_batches(Counting(), 0, 2, 0, 1, 2, DataConfig(num_workers=1)))
    next(batches)
    sender.send(worker_of(batches))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_does_not_outlive_a_rank_that_is_killed():
    """It would keep the connections open by which other ranks see that this one is gone."""
    receiver, sender = fork_context().Pipe()
    rank = fork_context().Process(target=_die, args=(sender,))
    rank.start()
    worker = receiver.recv()
    rank.join(LIMIT)
    deadline = time.monotonic() + 1.0  # PyTorch's own watch takes five
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(worker)


def test_a_rank_with_a_gpu_has_workers_and_pinned_batches(monkeypatch):
    assert number_of_workers(DataConfig()) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [number_of_workers(DataConfig(num_workers=n)) for n in (None, 0, 1)] == [2, 0, 1]
    loader = build_batches(Counting(), 0, 2, 0, 1, 2)
    assert (loader.num_workers, loader.pin_memory) == (2, True)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = Batch(torch.zeros(1, 2), torch.ones(1, 2)).pin_memory()
    assert [tensor.tolist() for tensor in pinned] == [batch.tokens.tolist(), batch.labels.tolist()]
