"""Worker processes that load a rank's micro-batches ahead of its steps: PyTorch's DataLoader's, bound to their rank.

A worker ends with its rank, however that ends: it shares the rank's connections, which stay open for the other ranks as
long as a copy is. And it does not end before it: a signal that a scheduler sends to every process of a job is for the
rank, which saves first. So workers ignore SIGTERM, and a rank ends them with another signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

import torch

from mor_megatron.config.schema import DataConfig

WITH_CUDA = 2
"""Workers of a rank with a GPU, unless it is told how many; Megatron-LM's number."""
_PR_SET_PDEATHSIG = 1
_END = signal.SIGALRM
"""From a rank to its workers; no scheduler sends it."""


def number_of_workers(data: DataConfig) -> int:
    """Worker processes of each loader of a rank. A CPU computes with the cores that they would take."""
    if data.num_workers is not None:
        return data.num_workers
    return WITH_CUDA if torch.cuda.is_available() else 0


def serve(rank: int, worker: int) -> None:
    """Bind this worker to its rank, the process that forked it; DataLoader's `worker_init_fn`.

    Args:
        rank: process id.
        worker: number of the worker, from DataLoader.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:  # it died before
        os._exit(1)
    signal.signal(_END, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Popen(Popen):
    def terminate(self) -> None:
        self._send_signal(_END)


class _Worker(ForkProcess):
    @staticmethod
    def _Popen(process: ForkProcess) -> Popen:
        return _Popen(process)


class WorkerContext(ForkContext):
    """Starts workers: forks that a rank ends with a signal of its own. DataLoader's `multiprocessing_context`.

    They share what the rank has read of the corpora. It has threads by now: what these lock, workers do not use.
    """

    Process = _Worker
