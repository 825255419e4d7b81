"""What a run measures besides its metrics: the norm of its weights, where its time goes, a profile.

Nothing here changes what is computed, and each costs nothing without its flag.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.timers import Timers
from torch.profiler import profile

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import print_rank_0
from mor_megatron.training.device_timers import DeviceTimers
from mor_megatron.training.engine import Engine
from mor_megatron.training.sections import IN_AN_ITERATION, Sections


class Observer:
    """Of one run; all ranks call its methods together."""

    def __init__(self, engine: Engine, config: Config, iteration: int):
        self.engine = engine
        self.logging = config.logging
        kind = DeviceTimers if torch.cuda.is_available() else Timers
        self.timers = kind(log_level=2, log_option="minmax") if config.logging.log_timers else None
        self.sections = Sections(self.timers)
        if self.timers is not None:
            engine.time_reduction(self.sections)
        self.trace = Trace(config, dist.get_rank(), iteration) if config.logging.profile else None
        self._seen: dict[str, float] = {}

    def begin(self, iteration: int) -> None:
        """Before an iteration, counted from 1."""
        if self.trace is not None:
            self.trace.begin(iteration)

    def end(self, iteration: int) -> dict[str, float]:
        """After an iteration; the fields that this adds to its record, times of this rank among them."""
        if self.trace is not None:
            self.trace.end(iteration)
        found = {}
        if self.logging.log_params_norm:
            found["params_norm"] = self.engine.weights_norm()
        return found | {_field(name): self._since_last(name) for name in IN_AN_ITERATION if self.timers is not None}

    def time_of_evaluation(self) -> dict[str, float]:
        """Fields for the record of an evaluation."""
        return {} if self.timers is None else {_field("eval-time"): self._since_last("eval-time")}

    def report(self, iterations: int) -> None:
        """Print the times since the last report, per iteration and over all ranks, as Megatron-LM does."""
        if self.timers is not None:
            text = self.timers.get_all_timers_string(self.sections.names, normalizer=max(1, iterations))
            if text is not None:
                print_rank_0(text)

    def close(self) -> None:
        """Write what is left of a profile."""
        if self.trace is not None:
            self.trace.close()

    def _since_last(self, name: str) -> float:
        """Milliseconds in a section since this was last asked."""
        total = self.timers(name).active_time()
        before, self._seen[name] = self._seen.get(name, 0.0), total
        return 1e3 * (total - before)


class Trace:
    """PyTorch's profiler over the iterations after `profile_step_start` up to `profile_step_end`, on some ranks.

    Args:
        rank: of this process.
        iteration: iterations that the run has completed.
    """

    def __init__(self, config: Config, rank: int, iteration: int):
        logging = config.logging
        self.first, self.last = logging.profile_step_start + 1, logging.profile_step_end
        self.takes_part = rank in logging.profile_ranks
        self.folder, self.rank = Path(logging.tensorboard_dir or config.checkpoint.save), rank
        self.profiler: profile | None = None
        self.begun = self.ended = iteration
        if iteration >= self.last:
            print_rank_0(f"nothing is profiled: iteration {self.last} (profile-step-end) is over")

    def begin(self, iteration: int) -> None:
        """Start, if it is time; a run that begins in the middle profiles the rest."""
        if self.takes_part and self.profiler is None and self.first <= iteration <= self.last:
            self.begun = iteration
            self.profiler = profile(record_shapes=True)
            self.profiler.start()

    def end(self, iteration: int) -> None:
        """Stop and write, if it is time."""
        self.ended = iteration
        if iteration == self.last:
            self.close()

    def close(self) -> None:
        """Stop and write what there is. A trace that cannot be written does not end the run."""
        if self.profiler is None:
            return
        self.profiler.stop()
        # A name that TensorBoard's plugin finds.
        path = self.folder / f"rank{self.rank}-iterations-{self.begun}-{self.ended}.pt.trace.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(path))
            print(f"profile of iterations {self.begun} to {self.ended}: {path}", flush=True)
        except (OSError, RuntimeError) as error:
            print(f"warning: {path} cannot be written ({error}): the profile is lost", flush=True)
        self.profiler = None


def _field(name: str) -> str:
    """`forward-backward` as a name of a record: `forward_backward_time_ms`."""
    return f"{name.removesuffix('-time').replace('-', '_')}_time_ms"
