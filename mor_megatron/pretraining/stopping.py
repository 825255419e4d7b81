"""Ending a run early and in order: on a signal, after some time, at an iteration.

After each iteration all ranks compare what they know; if one was told to stop, all save and leave with `EXIT_STOPPED`.
A scheduler that sees this status may start the same command again: it goes on where this run stopped.

SIGTERM, SIGUSR1 and SIGINT ask for it, sent to any rank. A second SIGINT ends the process at once. Signals are read by
a thread: the main thread may be inside an exchange that waits for a rank which will never come, and Python runs no
handlers there.

The same thread sees that the launcher (torchrun, deepspeed, srun) has died, for a rank that outlives it would go on
beside the next start. Before the first iteration is done there is nothing to save, and the rank ends at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from mor_megatron.config.schema import FaultConfig
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.launch import has_lost_launcher

EXIT_STOPPED = 85
"""Exit status of a run that stopped before its last iteration: the same command continues it."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit status after a second SIGINT: nothing was saved."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_DURATION, _INTERVAL, _ORPHANED = 1000, 1001, 1002  # beyond all signals
_WATCH_MS = 1000


class Stopper:
    """Watches for reasons to stop, as a context; enter it in the main thread.

    Its time begins when it is made. Child processes that are forked meanwhile, such as data-loading workers, do not
    take part: a signal to the whole process group is this process's business.
    """

    def __init__(self, faults: FaultConfig):
        self.faults = faults
        self.started = time.monotonic()
        self._received = 0
        self._has_begun = False
        self._is_told = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Stopper:
        if self.faults.exit_signal_handler:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._handlers = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
            self._earlier_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
            _watching.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _watching:
            _watching.discard(self)
            signal.set_wakeup_fd(self._earlier_writer)
            for number, handler in self._handlers.items():
                # A scheduler signals rank after rank: the others may have stopped this one before its own signal comes,
                # which must not end it now, saved and about to leave.
                signal.signal(number, signal.SIG_IGN if self._is_told else handler)
            os.close(self._writer)  # ends the thread

    def reason(self, iteration: int) -> str | None:
        """Why to stop after this iteration, the same on every rank; collective over all ranks.

        Args:
            iteration: iterations completed.
        Returns:
            A few words, or None to go on.
        """
        self._has_begun = True
        code = torch.tensor([self._own_reason(iteration)], device=device())
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        code = int(code)
        self._is_told = code != 0
        if code == _DURATION:
            return f"exit-duration-in-mins={self.faults.exit_duration_in_mins:g}"
        if code == _INTERVAL:
            return f"exit-interval={self.faults.exit_interval}"
        if code == _ORPHANED:
            return "the launcher has died"
        return signal.Signals(code).name if code else None

    def _own_reason(self, iteration: int) -> int:
        interval, minutes = self.faults.exit_interval, self.faults.exit_duration_in_mins
        if self._received == _ORPHANED:
            return _ORPHANED
        if interval is not None and iteration % interval == 0:
            return _INTERVAL
        if minutes is not None and time.monotonic() - self.started > 60.0 * minutes:
            return _DURATION
        return self._received

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            poll = select.poll()
            poll.register(signals, select.POLLIN)
            while True:
                if not poll.poll(_WATCH_MS):
                    if has_lost_launcher() and self._received != _ORPHANED:
                        self._become_orphan()
                    continue
                numbers = signals.read(64)
                if not numbers:
                    return
                for number in numbers:
                    self._receive(number)

    def _become_orphan(self) -> None:
        if self._has_begun:
            self._received = _ORPHANED
            return
        print("stopping before training: the launcher has died", file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)

    def _receive(self, number: int) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        if number in SIGNALS:
            self._received = number


_watching: set[Stopper] = set()


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Without a handler of Python's, the signal would end the process before the thread reads of it."""


def _withdraw_in_child() -> None:
    # It shares the pipe: a signal to the process group would count once for every child.
    if _watching and threading.current_thread() is threading.main_thread():
        _watching.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_withdraw_in_child)
