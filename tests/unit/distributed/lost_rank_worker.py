"""A rank of `test_roll_call.py`: runs collectives until something happens to it or to another rank.

Usage: lost_rank_worker.py FATE VICTIM DIRECTORY, with torch.distributed's variables in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from mor_megatron.config.schema import CheckpointConfig, Config, ParallelConfig
from mor_megatron.distributed.roll_call import answer_roll_calls, hold_roll_call, report_iteration


def main(fate: str, victim: int, directory: str) -> None:
    store, rank, world_size = next(dist.rendezvous("env://"))
    # As long as starting under load may take one rank longer than another, and not longer than a test may.
    timeout = timedelta(seconds=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    config = Config(
        parallel=ParallelConfig(pipeline_model_parallel_size=2), checkpoint=CheckpointConfig(save=directory)
    )
    answer_roll_calls(store, rank, world_size, config)
    report_iteration(7)
    token = torch.zeros(1)
    dist.all_reduce(token)
    if rank == victim:
        suffer(fate)
    try:
        # A chain: each rank waits for the next, and only one of them for the victim.
        if fate != "nothing":
            dist.recv(token, src=(rank + 1) % world_size)
    except RuntimeError as error:
        hold_roll_call(error)
        raise


def suffer(fate: str) -> None:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "sleeps":
        time.sleep(300)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
