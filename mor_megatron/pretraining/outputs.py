"""Before anything is built: whether a run may write where it wants to, and can.

A directory that cannot be written, that another run uses, or that has another run's checkpoints is refused; so is
Weights & Biases without a login. All ranks check, and all raise the same error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from mor_megatron.checkpointing.directory import candidates
from mor_megatron.checkpointing.manifest import MANIFEST
from mor_megatron.config.schema import CheckpointConfig, Config
from mor_megatron.distributed.collectives import first_problem
from mor_megatron.pretraining.lock import Lock
from mor_megatron.pretraining.writers import WeightsAndBiases, Writer


@contextlib.contextmanager
def claim_outputs(config: Config) -> Iterator[list[Writer]]:
    """Check where the run writes, and keep other runs out of `save` meanwhile; collective over all ranks.

    Returns:
        As a context: rank 0's writer for Weights & Biases, if there is to be one.
    Raises:
        ValueError: a directory cannot be written, `save` is in use or has checkpoints that this run would replace, or
            Weights & Biases refuses.
    """
    if config.training.skip_train:  # it only reads, also from a directory that a run is writing into
        yield []
        return
    with contextlib.ExitStack() as stack:
        problem, writers = None, []
        try:
            writers = _claim(config, stack)
        except ValueError as error:
            problem = str(error)
        problem = first_problem(problem)
        if problem is not None:
            raise ValueError(problem)
        yield writers


def _claim(config: Config, stack: contextlib.ExitStack) -> list[Writer]:
    checkpoint, leads = config.checkpoint, dist.get_rank() == 0
    if checkpoint.save is not None:
        with _writable("save", checkpoint.save):
            if leads:
                stack.enter_context(Lock(Path(checkpoint.save), _end))
        if leads:
            require_own_checkpoints(checkpoint)
    directory = config.logging.tensorboard_dir
    if directory is not None and leads and "://" not in directory:
        with _writable("tensorboard-dir", directory):
            pass
    if config.logging.wandb_project is None or not leads:
        return []
    writer = WeightsAndBiases(config)
    stack.callback(writer.close)
    return [writer]


def require_own_checkpoints(checkpoint: CheckpointConfig) -> None:
    """Refuse a `save` with checkpoints of a run that this one does not continue, and would replace one by one.

    Raises:
        ValueError: it has some.
    """
    save = Path(checkpoint.save).resolve()
    found = candidates(save)
    if not found:
        return
    load = Path(checkpoint.load).resolve() if checkpoint.load is not None else None
    if load is not None and load.parent == save and not (load / MANIFEST).exists():
        remedy = f"load={checkpoint.load} is no checkpoint, so give --load {checkpoint.save} to go on with it"
    elif load is not None and save in (load, load.parent):
        # With --branch-from, only what is loaded from there is fine-tuned.
        if not checkpoint.finetune or checkpoint.branch_from is not None:
            return
        remedy = "leave out --finetune to go on with it"
    else:
        remedy = f"add --load {checkpoint.save} to go on with it"
    raise ValueError(
        f"save={checkpoint.save} has {found[0].name} of a run that this one would replace: {remedy}, or name another "
        "directory"
    )


@contextlib.contextmanager
def _writable(name: str, directory: str) -> Iterator[None]:
    """Make sure that a directory exists and can be written; an OSError in the block is reported alike."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
        yield
    except OSError as error:
        reason = "it is a file" if Path(directory).is_file() else error.strerror or error
        raise ValueError(f"{name}={directory} cannot be written ({reason}): name another directory") from error


def _end(reason: str) -> None:
    print(f"error: {reason}; this run ends, so that they do not mix their checkpoints", file=sys.stderr, flush=True)
    os._exit(1)
