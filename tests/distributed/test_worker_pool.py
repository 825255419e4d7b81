"""The pool itself: worlds form anew, and a rank that raises, dies or hangs fails the test with its traceback."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from worker_pool import WorkerError, WorkerPool


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(3)
    yield pool
    pool.stop()


def sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("a wrong factor")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def process_id() -> int:
    return os.getpid()


def test_worlds_of_any_size(pool):
    assert pool.run(3, "all", sum_of_ranks) == [3.0, 3.0, 3.0]
    assert pool.run(2, "two", sum_of_ranks) == [1.0, 1.0]
    assert pool.run(3, "all", sum_of_ranks) == [3.0, 3.0, 3.0]


def test_workers_are_reused(pool):
    before = pool.run(2, "two", process_id)
    with pytest.raises(WorkerError, match=r"rank 0: Traceback[\s\S]*a wrong factor"):
        pool.run(1, "one", raise_on, 0)  # every rank has answered: nothing is stuck
    assert pool.run(2, "two", process_id) == before


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (raise_on, 60.0, r"rank 1: Traceback[\s\S]*KeyError: 'a wrong factor'"),
        (die_on, 60.0, r"rank 1 died with exit code 7"),
        (hang_on, 3.0, r"rank 0: finished\nrank 1 gave no answer \(limit 3 s\); it is at\n[\s\S]*in hang_on"),
    ],
)
def test_a_failing_rank_is_named_and_replaced(pool, function, timeout, message):
    pool.run(2, "two", sum_of_ranks)  # forms the world, which the limit is not for
    with pytest.raises(WorkerError, match=message):
        pool.run(2, "two", function, 1, timeout=timeout)
    assert pool.run(2, "two", sum_of_ranks) == [1.0, 1.0]
