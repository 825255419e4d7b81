"""Train the models of a family side by side, each in a process of its own: one small model does not fill a GPU."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mor_megatron.pretraining.stopping import EXIT_STOPPED

STOPS = (signal.SIGTERM, signal.SIGINT)
"""Ctrl-C sends the latter to all processes of a terminal, which makes no difference."""


def worst(statuses: Sequence[int]) -> int:
    """The exit status of all: that of the first that failed; otherwise EXIT_STOPPED if one was stopped, or 0."""
    return next((status for status in statuses if status not in (0, EXIT_STOPPED)), max(statuses))


class SideBySide:
    """The models of a family, each trained by a process of its own.

    Args:
        command: trains one model; its name follows.
        logs: directory of the family; a process writes to DIR/NAME/train.log.
    """

    def __init__(self, command: Sequence[str], logs: Path):
        self.command = command
        self.logs = logs
        self.stopped = False
        self._running: set[subprocess.Popen] = set()

    def train(self, names: Sequence[str], jobs: int) -> list[int]:
        """Train the models, at most `jobs` at a time; their exit statuses. To be called in the main thread.

        After SIGTERM or SIGINT, those that train are told to stop, and no other is started.
        """
        before = {number: signal.signal(number, lambda *_: self._stop()) for number in STOPS}
        try:
            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(self._one, names))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _one(self, name: str) -> int:
        if self.stopped:
            return EXIT_STOPPED
        with (
            open(self.logs / name / "train.log", "ab") as log,
            subprocess.Popen([*self.command, name], stdout=log, stderr=subprocess.STDOUT) as process,
        ):
            self._running.add(process)
            if self.stopped:  # in between
                process.terminate()
            status = process.wait()
            self._running.discard(process)
        if self.stopped and -status in STOPS:  # it had not got as far as to save something
            status = EXIT_STOPPED
        said = {0: "finished", EXIT_STOPPED: "stopped; the same command continues"}
        print(f"{name}: {said.get(status, f'exit status {status}, see its train.log')}", flush=True)
        return status

    def _stop(self) -> None:
        self.stopped = True
        for process in tuple(self._running):
            process.terminate()
