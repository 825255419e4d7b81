"""Processes that the distributed tests share: started once, and combined into a world for each layout.

If a worker raises, dies or hangs, the test fails with the tracebacks of all ranks, and the next test gets new workers.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forkserver import fork_context
from one_event_loop import share_event_loop

TIMEOUT = 120.0
"""Seconds until a job counts as hung; the longest takes a few."""
GRACE = 3.0
"""Seconds that the other ranks get to report after one has failed."""


class WorkerError(AssertionError):
    """A job failed on some rank; the message holds every rank's traceback."""


class WorkerPool:
    """Ranks over gloo, nothing of which is started before the first job.

    Args:
        size: processes, the largest world.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.directory = tempfile.TemporaryDirectory()
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []
        self.world: Hashable = None
        self.formed = 0

    def run(
        self, world_size: int, layout: Hashable, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[Any]:
        """Run `function(*args)` on ranks 0 .. world_size - 1.

        Args:
            layout: what the process groups depend on; as long as it stays the same, groups are kept.
            function: importable by name; arguments and results can be pickled.
        Returns:
            The result of each rank.
        Raises:
            WorkerError: a rank raised, died or did not answer in time.
        """
        if not self.workers:
            self._start()
        if self.world != (world_size, layout):
            self.world, self.formed = (world_size, layout), self.formed + 1
        job = pickle.dumps((self.formed, world_size, function, args))
        used = self.workers[:world_size]
        for _, connection in used:
            connection.send_bytes(job)
        answers = self._collect(used, timeout)
        if all(ok for ok, _ in answers.values()) and len(answers) == world_size:
            return [answers[rank][1] for rank in range(world_size)]
        self.world = None  # the groups may hold half a collective
        message = self._describe(used, answers, timeout)
        if len(answers) < world_size:
            self.stop()
        raise WorkerError(message)

    def stop(self) -> None:
        """End all workers."""
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers, self.world = [], None

    def _start(self) -> None:
        context = fork_context()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self.directory.name), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _collect(self, used: list[tuple[Any, Connection]], timeout: float) -> dict[int, tuple[bool, Any]]:
        pending = {connection: rank for rank, (_, connection) in enumerate(used)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                rank = pending.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                    failed = not answers[rank][0]
                except (EOFError, OSError):  # died
                    failed = True
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _describe(
        self, used: list[tuple[Any, Connection]], answers: dict[int, tuple[bool, Any]], timeout: float
    ) -> str:
        reports = []
        for rank, (process, _) in enumerate(used):
            if rank in answers:
                ok, answer = answers[rank]
                reports.append(f"rank {rank}: " + ("finished" if ok else answer))
                continue
            process.join(0.1)
            if process.exitcode is not None:
                reports.append(f"rank {rank} died with exit code {process.exitcode}")
                continue
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.3)
            stack = _stack_file(self.directory.name, rank).read_text()
            reports.append(f"rank {rank} gave no answer (limit {timeout:g} s); it is at\n{stack}")
        return "\n".join(reports)


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory) / f"stack_{rank}.txt"


def _serve(rank: int, connection: Connection, directory: str) -> None:
    """The life of a worker: jobs until the pool closes the pipe."""
    import torch

    torch.set_num_threads(1)
    share_event_loop()
    os.environ.update(LOCAL_RANK=str(rank))
    formed = 0
    with _stack_file(directory, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        while True:
            try:
                world, world_size, function, args = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                if world != formed:
                    form_world(rank, world_size, f"{directory}/world_{world}")
                    formed = world
                answer = (True, function(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            # Tensors go as plain bytes: shared memory would tie them to this process's life.
            connection.send_bytes(pickle.dumps(answer))
            del answer
            release_engines()


def form_world(rank: int, world_size: int, store: str) -> None:
    """A new process group in the place of the old one, and nothing left of what was built on that."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from megatron.core import parallel_state

    # ZeRO-3 numbers parameters and modules over a process's life and compares the numbers over ranks, whose lives
    # differ here. The count of modules is a default argument.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        if deepspeed.comm.comm.cdb is None:  # no engine was built
            dist.destroy_process_group()
        else:
            deepspeed.comm.destroy_process_group()  # forgets the groups that DeepSpeed derived, too
            deepspeed.comm.comm.cdb = None  # its view of the old world, which the next engine would take for its own
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )


def release_engines() -> None:
    """Let go of DeepSpeed's engines, which their hooks on gradient accumulators keep alive for ever.

    With them live their process groups, and each of gloo's has threads that wake a hundred times a second; and each
    further engine collects garbage several times, among all objects of those before.
    """
    import deepspeed

    for thing in gc.get_objects():
        # ZeRO-3's outlive even that; a second time, they would ask for a world that is gone.
        if isinstance(thing, deepspeed.DeepSpeedEngine) and not hasattr(thing, "released"):
            thing.destroy()
            thing.released = True
    gc.collect()
