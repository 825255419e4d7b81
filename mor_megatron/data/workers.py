"""Worker processes that load a rank's micro-batches ahead of its steps: PyTorch's DataLoader's, bound to their rank.

A worker ends with its rank, however that ends: it shares the rank's connections, which stay open for the other ranks as
long as a copy is. And it does not end before it: a signal that a scheduler sends to every process of a job is for the
rank, which saves first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

import torch

from mor_megatron.config.schema import DataConfig

WITH_CUDA = 2
"""Workers of a rank with a GPU, unless it is told how many; Megatron-LM's number."""
_PR_SET_PDEATHSIG = 1


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
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_if_the_rank_says_so, args=(rank,), daemon=True).start()


def _end_if_the_rank_says_so(rank: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank:
        pass
    os._exit(0)
