"""Where records of a run go: metrics.jsonl, TensorBoard, Weights & Biases. A failure of theirs never ends a run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from mor_megatron.config.schema import Config
from mor_megatron.files import write_whole
from mor_megatron.training.metrics import Record

RETRY_SECONDS = 60.0
WANDB_ID = "wandb_run_id"
"""File in the directory of checkpoints: all starts of a run are one run of W&B."""


class Writer(Protocol):
    """Somewhere that keeps records."""

    def write(self, record: Record) -> None:
        """Keep one record; it has an `iteration`."""

    def rewind(self, iteration: int) -> None:
        """The run goes back to this iteration: what was kept of later ones will be written again."""

    def close(self) -> None:
        """Finish."""


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended to.

    Args:
        path: the file.
        iteration: iterations that the run has completed. Lines after it, which an earlier attempt wrote beyond the
            checkpoint that this one starts from, move to metrics.dropped.jsonl, and so does a line cut off by a kill.
    """

    def __init__(self, path: Path, iteration: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._drop_lines_after(iteration)
        self.file = path.open("a")

    def write(self, record: Record) -> None:
        """Append and flush: a killed run keeps what it has reported."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def rewind(self, iteration: int) -> None:
        """Move the lines after `iteration` to metrics.dropped.jsonl."""
        self.file.close()
        self._drop_lines_after(iteration)
        self.file = self.path.open("a")

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _drop_lines_after(self, iteration: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _belongs(line, iteration)]
        if len(kept) == len(lines):
            return
        dropped = self.path.with_name("metrics.dropped.jsonl")
        print(
            f"{self.path}: {len(lines) - len(kept)} lines after iteration {iteration} move to {dropped.name}",
            flush=True,
        )
        with dropped.open("a") as file:
            file.writelines(line.rstrip("\n") + "\n" for line in lines if not _belongs(line, iteration))
        write_whole(self.path, "".join(kept))


class TensorBoard:
    """Scalars of a record under their own names, at its iteration.

    Args:
        directory: of the event files; TensorBoard shows all of them together.
        iteration: iterations that the run has completed. What earlier files have beyond it is hidden.
    """

    def __init__(self, directory: str, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        self.writer = SummaryWriter(directory, purge_step=iteration + 1)

    def write(self, record: Record) -> None:
        """Every number but the iteration itself."""
        for name, value in record.items():
            if name != "iteration" and value is not None:
                self.writer.add_scalar(name, value, record["iteration"])

    def rewind(self, iteration: int) -> None:
        """Begin a file that hides later points."""
        self.writer.close()
        self.writer = type(self.writer)(self.directory, purge_step=iteration + 1)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WeightsAndBiases:
    """A W&B run with the resolved settings, the same for all starts of a run; `WANDB_MODE=offline` needs no network.

    Raises:
        ValueError: W&B refuses: there is no login, no network, no such project.
    """

    def __init__(self, config: Config):
        import wandb

        self.Error = wandb.Error
        logging, save = config.logging, config.checkpoint.save
        known = Path(save) / WANDB_ID if save is not None else None
        identity = known.read_text().strip() if known is not None and known.exists() else uuid.uuid4().hex[:8]
        try:
            self.run = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                id=identity,
                resume="allow",
                config=asdict(config),
                dir=save,  # None: the current directory
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"wandb-project={logging.wandb_project} cannot be reported to ({reason}): log in by `wandb login` or "
                "WANDB_API_KEY, or set WANDB_MODE=offline"
            ) from error
        if known is not None:
            write_whole(known, identity + "\n")
        # W&B's own step can only grow, and a run may go back to a checkpoint.
        self.run.define_metric("*", step_metric="iteration")

    def write(self, record: Record) -> None:
        """All numbers of a record, to be drawn over its iteration."""
        if self.run is None:
            return
        try:
            self.run.log({name: value for name, value in record.items() if value is not None})
        except (OSError, self.Error) as error:  # its own process has died
            self.run = None
            print(f"W&B gets no more records ({error}); training goes on", file=sys.stderr, flush=True)

    def rewind(self, iteration: int) -> None:
        """Nothing: W&B keeps both attempts, and draws the later points beside the earlier ones."""

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            with contextlib.suppress(OSError, self.Error):
                self.run.finish()


class Tolerant:
    """A writer whose failure does not end the run: it is printed, retried later, and missing records are counted.

    Args:
        name: for messages.
        open_at: makes the writer, which continues after the given number of completed iterations.
        iteration: iterations that the run has completed.
    """

    def __init__(self, name: str, open_at: Callable[[int], Writer], iteration: int):
        self.name = name
        self._open_at = open_at
        self._iteration = iteration
        """Later records are still to be written."""
        self._writer: Writer | None = None
        self._missing = 0
        self._retry_at = 0.0
        self._tries(lambda writer: None)

    def write(self, record: Record) -> None:
        """Keep it, or count it as missing."""
        if self._tries(lambda writer: writer.write(record)):
            self._iteration = record["iteration"]
        else:
            self._missing += 1

    def rewind(self, iteration: int) -> None:
        """Rewind the writer, now or when it works again."""
        self._iteration = iteration
        self._tries(lambda writer: writer.rewind(iteration))

    def close(self) -> None:
        """Close the writer."""
        self._tries(lambda writer: writer.close())

    def _tries(self, action: Callable[[Writer], None]) -> bool:
        if self._writer is None and time.monotonic() < self._retry_at:
            return False
        try:
            if self._writer is None:
                self._writer = self._open_at(self._iteration)
            action(self._writer)
        except OSError as error:
            self._stop(error)
            return False
        if self._retry_at:
            print(f"{self.name} is written again; {self._missing} records are missing", flush=True)
            self._missing, self._retry_at = 0, 0.0
        return True

    def _stop(self, error: OSError) -> None:
        if not self._retry_at:
            reason = error.strerror or error
            print(f"{self.name} cannot be written ({reason}); training goes on", file=sys.stderr, flush=True)
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
        self._retry_at = time.monotonic() + RETRY_SECONDS


def open_writers(config: Config, iteration: int) -> list[Writer]:
    """The writers of files that the settings ask for; only rank 0 should call it.

    Args:
        iteration: iterations that the run has completed.
    """
    writers: list[Writer] = []
    save, events = config.checkpoint.save, config.logging.tensorboard_dir
    if save is not None:
        path = Path(save) / "metrics.jsonl"
        writers.append(Tolerant(str(path), lambda iteration: JsonLines(path, iteration), iteration))
    if events is not None:
        writers.append(Tolerant(events, lambda iteration: TensorBoard(events, iteration), iteration))
    return writers


def _belongs(line: str, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
