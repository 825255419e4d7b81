"""Loading: find the newest checkpoint that proves intact, and put it into an engine of any layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mor_megatron.checkpointing.agreement import from_all_ranks, from_rank_0
from mor_megatron.checkpointing.directory import candidates
from mor_megatron.checkpointing.engine_state import (
    prepare_state,
    refresh_weights,
    set_loss_scaler_state,
    torch_optimizer,
    updated_runs,
)
from mor_megatron.checkpointing.identity import model_shape, require_same_model, require_same_parameters
from mor_megatron.checkpointing.manifest import MANIFEST, Manifest, damage, read_manifest
from mor_megatron.checkpointing.pieces import BUFFER, STEP, WEIGHT, Cut, cut_of, stored_name
from mor_megatron.checkpointing.randomness import set_random_state
from mor_megatron.checkpointing.reader import CheckpointReader
from mor_megatron.checkpointing.save import persistent_buffers, united_cuts
from mor_megatron.config.schema import Config
from mor_megatron.parallel.distributed import print_rank_0
from mor_megatron.training.gradients import Engine
from mor_megatron.training.progress import Progress


def load_checkpoint(engine: Engine, config: Config, vocab_size: int) -> Progress:
    """Restore the newest intact checkpoint of `config.checkpoint.load`; collective over all ranks.

    Without `--load`, or with a directory that has no checkpoint, the run begins with that of `--branch-from`,
    else from scratch, and rank 0 says so. A damaged or incomplete one is named, and the one before it is taken, unless
    `load_strict`. With `finetune`, weights are all that is loaded, and the run starts at iteration 0.

    Returns:
        How far the loaded run is.
    Raises:
        ValueError: the checkpoint is of another model (names setting and both values), or none is intact.
    """
    found = _find(config)
    if found is None:
        return Progress()
    directory, manifest = found
    finetune = config.checkpoint.finetune
    saved = manifest.model | {"optimizer": manifest.optimizer}
    wanted = model_shape(config, vocab_size) | {"optimizer": config.optimizer.optimizer}
    require_same_model(directory, saved, wanted, finetune)
    parameters = united_cuts(engine)
    require_same_parameters(directory, manifest.parameters, parameters, finetune)
    restore(engine, CheckpointReader(directory, manifest), weights_only=finetune)
    if finetune:
        print_rank_0(f"fine-tuning from the weights of {directory}")
        return Progress()
    set_loss_scaler_state(engine, manifest.loss_scaler)
    set_random_state(manifest.random)
    print_rank_0(f"resuming from {directory}")
    return Progress(**manifest.progress)


def _find(config: Config) -> tuple[Path, Manifest] | None:
    """The checkpoint to begin with: of the run itself, else of the one that it branches from."""
    load, branch_from = config.checkpoint.load, config.checkpoint.branch_from
    found = None if load is None else find_checkpoint(Path(load), config.checkpoint.load_strict)
    if found is None and branch_from is not None:
        found = find_checkpoint(Path(branch_from), config.checkpoint.load_strict)
        if found is None:
            raise ValueError(f"branch-from={branch_from} has no checkpoint: name one, or a run that has saved")
    elif found is None and load is not None:
        print_rank_0(f"no checkpoint in {load}: starting from scratch")
    return found


def find_checkpoint(root: Path, strict: bool = False) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and files verify, on all ranks; None if there are no checkpoints.

    Every rank reads an equal share of the files, so that all of a checkpoint is read once.

    Args:
        root: a run's directory, or one checkpoint in it.
        strict: take the newest one or none.
    Raises:
        ValueError: there are checkpoints, and none is intact; with `strict`, the newest one is not.
    """
    directories = from_rank_0(_named(root) if dist.get_rank() == 0 else [])
    if not directories:
        return None
    for directory in directories:
        manifest, problem = _read(directory)
        if problem is None:
            names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
            problems = from_all_ranks(damage(directory, manifest, names))
            problem = next((each for each in problems if each is not None), None)
        if problem is None:
            return directory, manifest
        if strict:
            raise ValueError(f"{problem}: restore it, or leave out --load-strict to resume from an older checkpoint")
        print_rank_0(f"{directory.name} is not used: {problem}")
    raise ValueError(
        f"{root} has no intact checkpoint; the last one looked at: {problem}: leave out --load to start anew"
    )


def restore(engine: Engine, reader: CheckpointReader, weights_only: bool = False) -> None:
    """Write a checkpoint into the state of an engine, in place; collective over all ranks.

    Args:
        weights_only: leave the optimizer as it is in a new run, and weights of routers that the checkpoint lacks.
    Raises:
        ValueError: the checkpoint cannot be read on some rank, or lacks what its manifest lists.
    """
    problem = None
    try:
        _fill(engine, reader, weights_only)
    except ValueError as error:  # raised by all ranks or by none: the others would wait for this one
        problem = str(error)
    problem = next((each for each in from_all_ranks(problem) if each is not None), None)
    if problem is not None:
        raise ValueError(problem)
    refresh_weights(engine)


@torch.no_grad()
def _fill(engine: Engine, reader: CheckpointReader, weights_only: bool) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    optimizer = torch_optimizer(engine)
    runs = updated_runs(engine)
    stored = {run.name: stored_name(run.name, run.parameter) for run in runs}
    prepare_state(engine, runs, {} if weights_only else {run.name: reader.kinds[stored[run.name]] for run in runs})
    for run in runs:
        name = stored[run.name]
        cut = cut_of(name, run.parameter, engine.module)
        if weights_only and not _is_stored(name, cut, reader):
            continue
        for kind, value in run.states(optimizer).items():
            if kind == WEIGHT or kind in reader.kinds[name] - {STEP}:  # no state: it was never updated
                value.copy_(reader.run_of(kind, name, cut, rank, run.offset, run.length))
        if STEP in reader.kinds[name] and not weights_only:
            step = optimizer.state[run.updated][STEP]
            step.fill_(max(step.item(), reader.scalar(name)))
    for name, buffer in persistent_buffers(engine):
        cut = Cut(tuple(buffer.shape))
        if weights_only and not _is_stored(name, cut, reader):
            continue
        buffer.copy_(reader.run_of(BUFFER, name, cut, 0, 0, buffer.numel()).view_as(buffer))


def _is_stored(name: str, cut: Cut, reader: CheckpointReader) -> bool:
    """Whether fine-tuning finds it: everything but a router of another kind, which begins as in a new run."""
    stored = reader.manifest.parameters.get(name)
    return stored is not None and stored.unpadded == cut.unpadded


def _named(root: Path) -> list[Path]:
    return [root] if (root / MANIFEST).exists() else candidates(root)


def _read(directory: Path) -> tuple[Manifest | None, str | None]:
    """Rank 0's reading of the manifest, or what is wrong with it."""
    manifest, problem = None, None
    if dist.get_rank() == 0:
        try:
            manifest = read_manifest(directory)
        except ValueError as error:
            problem = str(error)
    return from_rank_0((manifest, problem))
