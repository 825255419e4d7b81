"""A file that says how far a run is and when it said so, for watchdogs outside.

SAVE/heartbeat.json: {"iteration", "time" (Unix, seconds), "state", "host", "pid"} of rank 0. While `state` is
`training`, a `time` that is older than the longest evaluation and save says that the run hangs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Literal

from mor_megatron.files import write_whole

FILE = "heartbeat.json"
State = Literal["training", "finished", "stopped", "failed"]


class Heartbeat:
    """Writes the file; make it on one rank.

    Args:
        directory: where; it is made if it is missing.
        seconds: shortest time between two writings while the state stays.
    """

    def __init__(self, directory: Path, seconds: float = 1.0):
        self.path = directory / FILE
        self.seconds = seconds
        self._last: tuple[float, State | None] = (0.0, None)
        self._failing = False

    def beat(self, iteration: int, state: State) -> None:
        """Write that `iteration` iterations are completed. A file that cannot be written is reported once, and does not
        end the run."""
        now = time.time()
        if state == self._last[1] and now - self._last[0] < self.seconds:
            return
        self._last = now, state
        record = {"iteration": iteration, "time": now, "state": state, "host": socket.gethostname(), "pid": os.getpid()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(record) + "\n", sync=False)
            self._failing = False
        except OSError as error:
            if not self._failing:
                print(f"{self.path} is not written ({error.strerror}); training goes on", file=sys.stderr, flush=True)
            self._failing = True
