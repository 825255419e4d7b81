"""Saving: all ranks write their shard entries, agree that they are on the disk, and only then is there a checkpoint.

1. rank 0 makes `iter_N.partial`;
2. every rank writes its entries there, flushed to the disk; with `--async-save`, a thread copies them and then writes;
3. all ranks exchange what they wrote, or what went wrong;
4. rank 0 writes config and manifest, renames the directory, points `latest` to it, deletes expired ones.

Whatever fails, older checkpoints stay as they are. Collectives are the main thread's alone: the other thread copies
and writes, and an asynchronous save is completed between two iterations (`poll`). The state changes in the optimizer's
step only, so forward and backward passes run while it is copied, and the step waits for the copy.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.checkpointing.compatibility import layout, model_shape
from mor_megatron.checkpointing.directory import PARTIAL, checkpoint_name, delete, expired, publish
from mor_megatron.checkpointing.engine_state import all_shardings, local_entries
from mor_megatron.checkpointing.host_copy import HostCopy
from mor_megatron.checkpointing.kept_tokenizer import KeptTokenizer
from mor_megatron.checkpointing.manifest import CONFIG, MANIFEST, Manifest
from mor_megatron.checkpointing.randomness import random_state
from mor_megatron.checkpointing.stored_file import StoredFile, write_tensors, write_text
from mor_megatron.config.cli import to_yaml
from mor_megatron.config.schema import Config
from mor_megatron.data.corpora import corpus_sizes, data_arguments
from mor_megatron.distributed.collectives import from_all_ranks, from_rank_0
from mor_megatron.distributed.cpu import device
from mor_megatron.training.engine import Engine
from mor_megatron.training.progress import Progress


class SaveError(RuntimeError):
    """A checkpoint could not be written; older ones are as they were."""


@dataclass
class _Save:
    """A save under way."""

    partial: Path
    manifest: Manifest
    files: dict[str, StoredFile] = field(default_factory=dict)
    """What this rank wrote, by name."""
    error: str | None = "it was not written"
    """Why it did not; None once it did."""
    thread: threading.Thread | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    """The state may change."""

    @property
    def is_written(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Writes the checkpoints of a run under `config.checkpoint.save`. All ranks call the same methods together.

    Args:
        tokenizer: to be kept in each.
    """

    def __init__(self, engine: Engine, config: Config, tokenizer: KeptTokenizer | None = None):
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.corpora, self.data_arguments = corpus_sizes(config.data), data_arguments(config.data)
        self.root = Path(config.checkpoint.save)
        self.shardings = all_shardings(engine)
        self.last_saved = 0
        """Iteration of the newest checkpoint that this run has completed; 0: none yet. Equal on all ranks."""
        self.last_failed: str | None = None
        """Why the most recent save failed; None if it did not. Equal on all ranks."""
        self.stalled = 0.0
        """Seconds that training has waited for checkpoints; each rank's own."""
        self._in_flight: _Save | None = None
        self._host_copy = HostCopy(device())
        self._hook = engine.optimizer.register_step_pre_hook(self._await_copy)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; with `async_save`, return at once: the next optimizer step waits until it is copied.

        Raises:
            SaveError: this save or the one before failed, and `on_save_failure` is `stop`.
        """
        start = time.perf_counter()
        try:
            self.finish()
            self._begin(progress)
        finally:
            self.stalled += time.perf_counter() - start

    def poll(self) -> None:
        """Complete an asynchronous save that all ranks have written; call it once an iteration.

        Raises:
            SaveError: it failed, and `on_save_failure` is `stop`.
        """
        if self._in_flight is not None and all(from_all_ranks(self._in_flight.is_written)):
            self._complete()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and complete it.

        Raises:
            SaveError: it failed, and `on_save_failure` is `stop`.
        """
        if self._in_flight is not None:
            self._complete()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Leave no thread behind. A run that breaks down cannot complete a save: other ranks may be gone."""
        self._hook.remove()
        if self._in_flight is not None and self._in_flight.thread is not None:
            self._in_flight.thread.join()

    def _begin(self, progress: Progress) -> None:
        partial = self.root / f"{checkpoint_name(progress.iteration)}{PARTIAL}"
        error = from_rank_0(_failure(lambda: _make_empty(partial)) if dist.get_rank() == 0 else None)
        if error is not None:
            self._report(partial, [error])
            return
        save = self._in_flight = _Save(partial, self._manifest(progress))
        entries = local_entries(self.engine)
        if self.config.checkpoint.async_save:
            self._host_copy.mark()
            save.thread = threading.Thread(target=self._copy_and_write, args=(save, entries), name="checkpoint")
            save.thread.start()
        else:
            self._write(save, entries)
            self._complete()

    def _copy_and_write(self, save: _Save, entries: list[tuple[str, Tensor]]) -> None:
        try:
            entries = self._host_copy.copy(entries)
        finally:
            save.copied.set()
        self._write(save, entries)

    def _write(self, save: _Save, entries: list[tuple[str, Tensor]]) -> None:
        """What this rank has to write; on rank 0, the tokenizer, too."""

        def write() -> None:
            rank = dist.get_rank()
            if entries:
                name = f"state_{rank:05d}.safetensors"
                save.files[name] = write_tensors(save.partial / name, entries)
            if rank == 0 and self.tokenizer is not None:
                save.files |= self.tokenizer.write(save.partial)

        save.error = _failure(write)

    def _await_copy(self, *step: object) -> None:
        save = self._in_flight
        if save is not None and save.thread is not None:
            start = time.perf_counter()
            save.copied.wait()
            self.stalled += time.perf_counter() - start

    def _complete(self) -> None:
        save, self._in_flight = self._in_flight, None
        if save.thread is not None:
            save.thread.join()
        outcomes = from_all_ranks((save.files, save.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
        if not errors and dist.get_rank() == 0:
            files = {name: file for written, _ in outcomes for name, file in written.items()}
            error = _failure(lambda: self._publish(save, files))
            errors = [] if error is None else [f"rank 0: {error}"]
        errors = from_rank_0(errors)
        if not errors:
            self.last_saved = save.manifest.iteration
        self._report(save.partial, errors)
        if not errors and dist.get_rank() == 0:
            self._retain()

    def _publish(self, save: _Save, files: dict[str, StoredFile]) -> None:
        save.manifest.files.update(files)
        save.manifest.files[CONFIG] = write_text(save.partial / CONFIG, to_yaml(self.config))
        write_text(save.partial / MANIFEST, save.manifest.to_json())
        publish(save.partial)

    def _retain(self) -> None:
        checkpoint = self.config.checkpoint
        if checkpoint.keep_last is None:
            return
        error = _failure(lambda: delete(expired(self.root, checkpoint.keep_last, checkpoint.keep_every)))
        if error is not None:
            print(f"old checkpoints in {self.root} could not be deleted: {error}", file=sys.stderr, flush=True)

    def _report(self, partial: Path, errors: list[str]) -> None:
        final = partial.with_suffix("")
        self.last_failed = None
        if not errors:
            if dist.get_rank() == 0:
                print(f"saved {final}", flush=True)
            return
        self.last_failed = f"{final} was not saved ({'; '.join(errors)}); older checkpoints are untouched"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if self.config.checkpoint.on_save_failure == "stop":
            raise SaveError(self.last_failed)
        if dist.get_rank() == 0:
            print(f"{self.last_failed}; training goes on", file=sys.stderr, flush=True)

    def _manifest(self, progress: Progress) -> Manifest:
        return Manifest(
            progress=asdict(progress),
            model=model_shape(self.config),
            layout=layout(self.config, parallel_state.get_data_parallel_world_size()),
            optimizer=self.config.optimizer.optimizer,
            versions={package: version(package) for package in ("torch", "megatron-core", "deepspeed")},
            loss_scaler=self.engine.loss_scaler_state(),
            random=random_state(),
            parameters=self.shardings,
            files={},
            tokenizer=None if self.tokenizer is None else self.tokenizer.entry(),
            corpora=self.corpora,
            data_arguments=self.data_arguments,
        )


def _make_empty(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _failure(action: Callable[[], None]) -> str | None:
    """Run an action; the error of the operating system in words, or None."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
    return None
