"""Programs and their ranks that tests may kill: real processes, forked from one that has everything imported.

Each rank is made before anything of a run exists, and runs the entry point as `python pretrain_mor.py FLAGS` does, its
output in a file.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from forkserver import fork_context

ROOT = Path(__file__).parents[1]
LIMIT = 300.0  # seconds until a rank counts as hung; a few are the rule


def as_torchrun(count: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Ranks:
    """The processes of one run.

    Args:
        flags: of the program.
        count: ranks.
        outputs: directory of `rank_0.log`, ...
        environment: what a launcher sets beside rank and number of ranks.
        program: its path below the repository.
        launcher: number of ranks -> the environment of each.
    """

    def __init__(
        self,
        flags: list[str],
        count: int,
        outputs: Path,
        environment: dict[str, str] | None = None,
        program: str = "pretrain_mor.py",
        launcher: Callable[[int], list[dict[str, str]]] = as_torchrun,
    ):
        outputs.mkdir(parents=True, exist_ok=True)
        self.logs = [outputs / f"rank_{rank}.log" for rank in range(count)]
        self.started = time.monotonic()
        self.processes: list[ForkServerProcess] = []
        for own, log in zip(launcher(count), self.logs, strict=True):
            log.unlink(missing_ok=True)
            arguments = flags, own | (environment or {}), str(log), program
            self.processes.append(fork_context().Process(target=be_a_rank, args=arguments))
        for process in self.processes:
            process.start()

    def wait_for(self, text: str) -> None:
        """Until rank 0 has printed it; a run that ends before that fails the test."""
        deadline = time.monotonic() + LIMIT
        while text not in self.output(0):
            waits = self.is_alive() and time.monotonic() < deadline
            assert waits, f"no {text!r} in: {self.output(0)[-3000:]}"
            time.sleep(0.01)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait_until(self, instant: float) -> None:
        """Until so many seconds after the start, or until the run has ended."""
        while self.elapsed() < instant and self.is_alive():
            time.sleep(0.002)

    def is_alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def join(self) -> list[int]:
        """Wait for all; their exit statuses, minus the signal for those that one ended."""
        for rank, process in enumerate(self.processes):
            process.join(LIMIT)
            assert not process.is_alive(), f"rank {rank} hangs: {self.output(rank)[-3000:]}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def stop(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def running(flags: list[str], count: int, outputs: Path, environment: dict[str, str] | None = None, **options):
    """`Ranks`, of which none outlives the block."""
    ranks = Ranks(flags, count, outputs, environment, **options)
    try:
        yield ranks
    finally:
        ranks.stop()


def run_program(program: str, words: list, outputs: Path) -> tuple[int, str]:
    """Exit status and output of `python PROGRAM WORDS`, without the wait for its imports."""
    with running(list(map(str, words)), 1, outputs, program=program, launcher=lambda count: [{}]) as ranks:
        return ranks.join()[0], ranks.output(0)


@contextmanager
def launcher(flags: list[str], outputs: Path):
    """A process that starts a run of two ranks as torchrun does; the process, and what a rank has printed so far."""
    outputs.mkdir(parents=True)
    logs = [outputs / f"rank_{rank}.log" for rank in range(2)]
    for log in logs:
        log.touch()
    process = fork_context().Process(target=_launch, args=(flags, logs))
    process.start()
    try:
        yield process, lambda rank: logs[rank].read_text()
    finally:
        process.kill()
        process.join()


def _launch(flags: list[str], logs: list[Path]) -> None:
    for environment, log in zip(as_torchrun(2), logs, strict=True):
        if os.fork() == 0:
            try:
                be_a_rank(flags, environment | {"TORCHELASTIC_RUN_ID": "none"}, str(log))
            except SystemExit as end:
                print(f"exit status {end.code}", flush=True)
            finally:
                os._exit(0)
    os.wait()


def be_a_rank(flags: list[str], environment: dict[str, str], log: str, program: str = "pretrain_mor.py") -> None:
    """Run a program as the process that this is, and end with its exit status."""
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a test before may have run to a stop, which ignores late signals
    sys.stdout.flush()
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv, path = [program, *flags], ROOT / program
    sys.path.insert(0, str(path.parent))
    import torch

    torch.set_num_threads(1)  # ranks share the cores
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
        sys.stdout.flush()
        sys.stderr.flush()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
