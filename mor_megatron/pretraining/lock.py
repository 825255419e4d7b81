"""One run at a time writes into a directory: a file that says who, and shows that its writer is alive.

DIR/lock.json is made by whoever comes first and removed at the end; its time of modification is the heartbeat. A
process that was killed leaves it behind: on the same machine that is seen at once, from another one after
`STALE_SECONDS`. Times are those of the file system, so that clocks of nodes need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mor_megatron.files import flush

LOCK = "lock.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""Without a heartbeat for so long, a process of another machine counts as lost: many beats, for file systems stall."""


@dataclass(frozen=True)
class Holder:
    """The process that has a lock."""

    host: str
    pid: int
    machine: str
    """One start of one machine, and one space of process numbers in it (containers may have their own)."""
    began: str
    """When the process began, by its machine's clock: numbers of processes are used again."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """None: it is of another machine, and not known."""
        return _began(self.pid) == self.began if self.machine == _machine() else None


class Lock:
    """A lock on a directory, as a context.

    Args:
        directory: it exists.
        lost: called, in another thread, when another process has taken the lock over; it should end this one.
    """

    def __init__(self, directory: Path, lost: Callable[[str], None]):
        self.directory = directory
        self.path = directory / LOCK
        self._lost = lost
        pid = os.getpid()
        self._text = json.dumps(asdict(Holder(socket.gethostname(), pid, _machine(), _began(pid) or "")))
        self._released = threading.Event()

    def __enter__(self) -> Lock:
        """Take it, from a holder that is gone if need be; wait where that cannot be known yet.

        Raises:
            ValueError: another process has it.
            OSError: the directory cannot be written.
        """
        while not self._create():
            gone = self._await_end()
            print(f"{self.path}: {gone}; this run takes the lock over", flush=True)
            self.path.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._text:
                self.path.unlink()

    def _create(self) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(self._text)
                flush(file)
        except FileExistsError:
            return False
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _await_end(self) -> str:
        """Wait until its holder is known to be gone, and say why it is; ValueError if it lives."""
        seen, told = None, False
        while True:
            try:
                with (
                    self.path.open() as file
                ):  # opened, not looked up: network file systems cache what is known of a file
                    holder, beat = _holder(file.read()), os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return "it was released"
            who = holder or "an unknown process"
            alive = holder.is_alive() if holder is not None else None
            if alive is False:
                return f"{who} has ended"
            if alive or (seen is not None and beat != seen):
                raise ValueError(
                    f"save={self.directory} is in use by {who}: wait until it has ended, or name another directory"
                )
            age = _now(self.directory) - beat
            if age > STALE_SECONDS:
                return f"{who} has shown no sign of life for {age:.0f} s"
            if not told:
                print(
                    f"{self.path}: {who} showed a sign of life {age:.0f} s ago; waiting for another one, for "
                    f"{STALE_SECONDS - age:.0f} s at most",
                    flush=True,
                )
                told = True
            seen = beat
            time.sleep(min(1.0, BEAT_SECONDS / 2))

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                text = self.path.read_text()
                if text == self._text:
                    os.utime(self.path)
                elif not self._released.is_set():
                    self._lost(f"{self.path} was taken over by {_holder(text) or 'another process'}")
            except FileNotFoundError:
                with contextlib.suppress(OSError):
                    self._create()
            except OSError:
                pass  # it may come back


def _holder(text: str) -> Holder | None:
    """None: it is being written, or damaged."""
    try:
        return Holder(**json.loads(text))
    except (json.JSONDecodeError, TypeError):
        return None


def _machine() -> str:
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: nothing is known of other processes
        return f"{socket.gethostname()} {os.getpid()}"


def _began(pid: int) -> str | None:
    """When a process of this machine began, in ticks; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie writes no more


def _now(directory: Path) -> float:
    with tempfile.TemporaryFile(dir=directory) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime
