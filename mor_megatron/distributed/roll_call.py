"""When a rank dies or hangs, the others find out which, say so in one line, and exit.

A failed exchange names a socket at best. So whoever sees one calls the roll: every rank has a thread that answers
through the rendezvous store, also while its main thread waits for a rank that waits for the lost one. After
`ANSWER_SECONDS` the first rank that answered reports the ones that did not, with their places in the layout and the
iteration, and all exit with `EXIT_CODE`. Each rank that answers leaves the stacks of its threads in SAVE/stacks.
Nothing is sent, and nothing is polled, as long as all is well.

- gloo: a dead rank closes its connections, so the call is held at once; a stopped one is noticed after
  --distributed-timeout-minutes. Both are tested.
- NCCL (reasoned, not run): its watchdog ends a process by itself when an operation fails or times out, without an
  exception in Python, and prints the operation. An error that does reach Python is handled as with gloo; a rank whose
  watchdog was faster counts as lost in the others' call.
- torchrun and deepspeed end the other ranks themselves as soon as one dies, and name it; they are faster than the call.
  They do not see a rank that hangs.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mor_megatron.config.schema import Config, ParallelConfig

ANSWER_SECONDS = 5.0
EXIT_CODE = 1
STACKS = "stacks"
"""Directory of the stacks within that of the checkpoints."""

_PACKAGE = str(Path(__file__).parents[1])
_FAREWELL = "farewell"
_current: RollCall | None = None


def answer_roll_calls(store: dist.TCPStore | dist.PrefixStore, rank: int, world_size: int, config: Config) -> None:
    """Let this process answer, from now to its end; once a process.

    Args:
        store: the rendezvous store that all ranks share.
        config: the layout, and where stacks go (`checkpoint.save`; None: nowhere).
    """
    global _current
    assert _current is None
    _current = RollCall(store, rank, world_size, config)
    atexit.register(_current.leave)


def report_iteration(iteration: int) -> None:
    """Let a later roll call know that this iteration has begun."""
    if _current is not None:
        _current.iteration = iteration


def hold_roll_call(error: BaseException) -> None:
    """Call the roll if `error` is that of an exchange between ranks, and end this process; else return."""
    if _current is not None and is_exchange_error(error):
        _current.hold(error)


def is_exchange_error(error: BaseException) -> bool:
    """Whether an exchange between ranks failed, and not the work of this rank."""
    # NCCL and the store have types; gloo only says in the text where in gloo something went wrong.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class RollCall:
    """One rank's part: a thread that waits for a call, and what it does when there is one."""

    def __init__(self, store: dist.TCPStore | dist.PrefixStore, rank: int, world_size: int, config: Config):
        self.rank, self.world_size = rank, world_size
        self.iteration = 0
        """The one that has begun; 0: training has not."""
        self.failure = ""
        """Traceback of the exchange that failed here, which the main thread has left."""
        self.stacks = Path(config.checkpoint.save) / STACKS if config.checkpoint.save is not None else None
        # The launcher's agent hosts the store of torchrun; otherwise rank 0 does.
        self.hosted_by = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self.is_host = rank == 0 and self.hosted_by == "rank 0"
        self.store = dist.PrefixStore("roll_call", store)
        place = place_in_layout(rank, world_size, config.parallel)
        self.store.set(f"name/{rank}", ", ".join([socket.gethostname(), f"process {os.getpid()}", *place]))
        # A connection of its own: the thread occupies it while it waits.
        self.waiting = dist.PrefixStore("roll_call", store.clone())
        self.thread = threading.Thread(target=self._wait, name="roll call", daemon=True)
        self.thread.start()

    def hold(self, error: BaseException) -> None:
        """Call every rank, this one included, and wait for the end of the process."""
        # gloo begins with a line of its source, and goes on with advice.
        text = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        reason = f"rank {self.rank}: {text}"
        self.failure = "".join(traceback.format_exception(error))
        try:
            # The first call gives the reason: exchanges with a rank whose own has failed end as well, and say less.
            reason = self.store.compare_set("reason", "", reason).decode()
            self.store.multi_set([f"call/{rank}" for rank in range(self.world_size)], [reason] * self.world_size)
            self.thread.join()  # it ends the process, unless the store is lost
        except dist.DistError:
            pass
        _exit(f"error: lost {self.hosted_by}, which hosts the rendezvous store; {reason}")

    def leave(self) -> None:
        """End the thread; this rank will not answer any more. The store's host leaves last, others still use it."""
        try:
            self.store.set(f"call/{self.rank}", _FAREWELL)
            self.thread.join()
            left = self.store.add("left", 1)
            deadline = time.monotonic() + ANSWER_SECONDS
            while self.is_host and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self.store.add("left", 0)
        except dist.DistError:
            pass  # the store's host is gone, and with it everyone who could call

    def _wait(self) -> None:
        try:
            reason = self._next_call()
            if reason != _FAREWELL:
                self._answer(reason)
        except dist.DistError:
            return  # the store's host is gone: this rank's own exchanges will fail, and `hold` says why

    def _next_call(self) -> str:
        key = f"call/{self.rank}"
        while True:
            try:
                self.waiting.wait([key], timedelta(days=7))
                return self.waiting.get(key).decode()
            except dist.DistStoreError:
                continue  # a week without a call

    def _answer(self, reason: str) -> None:
        """Answer, see who else does, and end the process."""
        when = f"iteration {self.iteration}, " if self.iteration else ""
        self.waiting.set(f"here/{self.rank}", when + _where_main_thread_is())
        stacks = self._dump_stacks()
        lost = set(range(self.world_size))
        deadline = time.monotonic() + ANSWER_SECONDS
        while lost and time.monotonic() < deadline:
            time.sleep(0.1)
            lost = {rank for rank in lost if not self.waiting.check([f"here/{rank}"])}
        report = None
        if self.rank == min(set(range(self.world_size)) - lost):
            report = f"error: {self._lost(lost) if lost else self._whereabouts()}; {reason}{stacks}"
        if self.is_host:
            time.sleep(1.0)  # the others still look at the store
        _exit(report)

    def _dump_stacks(self) -> str:
        """What every thread of this process is doing, as a file; where it is, in words for the report."""
        if self.stacks is None:
            return ""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
            with (self.stacks / f"rank_{self.rank:05d}.txt").open("w") as file:
                file.write(self.failure and f"the exchange that failed\n{self.failure}\n")
                for ident, frame in sys._current_frames().items():
                    stack = "".join(traceback.format_stack(frame))
                    file.write(f"{names.get(ident, 'a thread of a library')}\n{stack}\n")
        except OSError as error:
            return f"; stacks could not be written to {self.stacks} ({error.strerror})"
        return f"; stacks of the ranks that answered are in {self.stacks}"

    def _lost(self, ranks: set[int]) -> str:
        shown = [f"{rank} ({self.waiting.get(f'name/{rank}').decode()})" for rank in sorted(ranks)[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        # A rank that lags behind is waited for, so that this rank's iteration is that of all.
        when = f" in iteration {self.iteration}" if self.iteration else ""
        return f"lost {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(shown)}{more} of {self.world_size}{when}"

    def _whereabouts(self) -> str:
        """Nobody is lost: then where each rank is tells who keeps the others waiting."""
        places: dict[str, list[str]] = {}
        for rank in range(self.world_size):
            places.setdefault(self.waiting.get(f"here/{rank}").decode(), []).append(str(rank))
        rarest = sorted(places.items(), key=lambda place: len(place[1]))[:4]
        found = "; ".join(f"{', '.join(ranks[:8])}{', ...' * (len(ranks) > 8)} in {place}" for place, ranks in rarest)
        return f"an exchange failed although all {self.world_size} ranks are alive: {found}"


def place_in_layout(rank: int, world_size: int, parallel: ParallelConfig) -> list[str]:
    """Coordinates of a rank in words, those of sizes above 1; ranks are numbered as in `initialize_model_parallel`."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = world_size // (tensor * pipeline)
    places = (
        ("pipeline stage", rank // (tensor * data), pipeline),
        ("data-parallel rank", rank // tensor % data, data),
        ("tensor-parallel rank", rank % tensor, tensor),
    )
    return [f"{name} {index} of {size}" for name, index, size in places if size > 1]


def _where_main_thread_is() -> str:
    """Innermost line of this package that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    stack = [entry for entry in traceback.extract_stack(frame) if entry.filename.startswith(_PACKAGE)]
    mine = [entry for entry in stack if entry.filename != __file__]
    return f"{Path(mine[-1].filename).name}:{mine[-1].lineno}" if mine else "no line of mor_megatron"


def _exit(report: str | None) -> None:
    if report is not None:
        print(report, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Destructors of groups that have lost a member would wait for it.
    os._exit(EXIT_CODE)
