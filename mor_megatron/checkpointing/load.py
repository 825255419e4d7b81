"""Loading: find the newest checkpoint that proves intact, and put it into an engine of any layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mor_megatron.checkpointing.compatibility import (
    Difference,
    argument_differences,
    corpus_differences,
    differences,
    refuse,
    require_same_parameters,
)
from mor_megatron.checkpointing.directory import REPLACED, candidates, checkpoint_name, checkpoints, iteration_of
from mor_megatron.checkpointing.engine_state import (
    all_shardings,
    persistent_buffers,
    prepare_states,
    sharding_of,
    slice_states,
)
from mor_megatron.checkpointing.kept_tokenizer import KeptTokenizer, tokenizer_differences
from mor_megatron.checkpointing.manifest import MANIFEST, Manifest, damage, read_manifest, read_settings
from mor_megatron.checkpointing.randomness import set_random_state
from mor_megatron.checkpointing.reader import CheckpointReader
from mor_megatron.checkpointing.shards import BUFFER, STEP, WEIGHT, Sharding
from mor_megatron.config.schema import Change, Config
from mor_megatron.data.corpora import corpus_sizes, data_arguments
from mor_megatron.distributed.collectives import first_problem, from_rank_0
from mor_megatron.distributed.initialize import print_rank_0
from mor_megatron.distributed.replicated import is_tied_copy
from mor_megatron.model.stored_names import EMBEDDING
from mor_megatron.training.engine import Engine
from mor_megatron.training.progress import Progress


def load_checkpoint(engine: Engine, config: Config, tokenizer: KeptTokenizer | None = None) -> Progress:
    """Restore the newest intact checkpoint of `config.checkpoint.load`; collective over all ranks.

    Without `--load`, or with a directory that has no checkpoint, the run begins with that of `--branch-from`,
    else from scratch, which rank 0 prints. A damaged or incomplete one is named, and the one before it is taken, unless
    `load_strict` or `ckpt_step`. With `finetune`, weights are all that is loaded, and the run starts at iteration 0.
    Rank 0 prints the settings that differ from the checkpoint's.

    Args:
        tokenizer: the run's.
    Returns:
        How far the loaded run is.
    Raises:
        ValueError: the checkpoint is converted, or of another model or tokenizer (names setting and both values), none
            is intact, or there is none where one is required.
    """
    found = _find(config)
    if found is None:
        return Progress()
    directory, manifest, finetune = found
    reader = CheckpointReader(directory, manifest)
    reader.require_entries()
    checkpoint = config.checkpoint
    weights_only = finetune or checkpoint.no_load_optim
    may_differ = ({Change.FUNCTION} if finetune else set()) | ({Change.STATE} if weights_only else set())
    changed = _differences(directory, manifest, config, tokenizer)
    refuse(directory, changed, may_differ)
    require_same_parameters(directory, manifest.parameters, all_shardings(engine), finetune)
    restore(engine, reader, weights_only)
    print_rank_0(f"fine-tuning from the weights of {directory}" if finetune else f"resuming from {directory}")
    for each in changed:
        if not finetune or each.change is Change.FUNCTION:  # the rest is of a run that this one does not go on from
            print_rank_0(f"  {each}")
    if finetune:
        return Progress()
    if not checkpoint.no_load_optim:
        engine.set_loss_scaler_state(manifest.loss_scaler)
    if not checkpoint.no_load_rng:
        set_random_state(manifest.random)
    return Progress(**manifest.progress)


def _find(config: Config) -> tuple[Path, Manifest, bool] | None:
    """The checkpoint to begin with, the run's own or that which it branches from, and whether to fine-tune it."""
    checkpoint = config.checkpoint
    load, branch_from, strict = checkpoint.load, checkpoint.branch_from, checkpoint.load_strict
    own = None if load is None else find_checkpoint(Path(load), strict, checkpoint.ckpt_step)
    if own is not None:
        return *own, checkpoint.finetune and branch_from is None
    if branch_from is not None:
        other = find_checkpoint(Path(branch_from), strict)
        if other is None:
            raise ValueError(f"branch-from={branch_from} has no checkpoint: name one, or a run that has saved")
        return *other, checkpoint.finetune
    if load is not None:
        _accept_missing(config)
        print_rank_0(f"no checkpoint in {load}: starting from scratch")
    return None


def _accept_missing(config: Config) -> None:
    """Refuse to start from scratch where something was to be loaded; a run's first start finds its --save empty."""
    checkpoint = config.checkpoint
    own = checkpoint.save is not None and Path(checkpoint.save).resolve() == Path(checkpoint.load).resolve()
    reasons = {
        "finetune": checkpoint.finetune,
        "skip-train": config.training.skip_train,
        "exit-on-missing-checkpoint": checkpoint.exit_on_missing_checkpoint,
        "load-strict": checkpoint.load_strict and not own,
    }
    for name, holds in reasons.items():
        if holds:
            raise ValueError(
                f"load={checkpoint.load} has no checkpoint, and {name} needs one: give a run's --save directory, or a "
                f"checkpoint in it, or leave out --{name} to start from scratch"
            )


def _differences(
    directory: Path, manifest: Manifest, config: Config, tokenizer: KeptTokenizer | None
) -> list[Difference]:
    """What is otherwise than in the run that wrote a checkpoint, which rank 0 reads."""
    found, problem = [], None
    if dist.get_rank() == 0:
        try:
            found = differences(read_settings(directory, manifest), config)
            found += corpus_differences(manifest.corpora or {}, corpus_sizes(config.data))
            found += argument_differences(manifest.data_arguments, data_arguments(config.data))
            found += [] if tokenizer is None else tokenizer_differences(directory, manifest, tokenizer)
        except ValueError as error:
            problem = f"{directory} cannot be compared with this run, it is of another version: {error}"
    found, problem = from_rank_0((found, problem))
    if problem is not None:
        raise ValueError(problem)
    return found


def find_checkpoint(
    root: Path, strict: bool = False, iteration: int | None = None, newest: int | None = None
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and files verify, on all ranks; None if there are no checkpoints.

    Every rank reads an equal part of the files, so that all of a checkpoint is read once.

    Args:
        root: a run's directory, or one checkpoint in it.
        strict: take the newest one or none.
        iteration: take the one of this iteration or none.
        newest: pass over those of later iterations.
    Raises:
        ValueError: there are checkpoints, and none is intact; with `strict`, the newest one is not; there is none of
            `iteration`.
    """
    directories = from_rank_0(_named(root, all_of_them=iteration is not None) if dist.get_rank() == 0 else [])
    if iteration is not None:
        there = " ".join(directory.name for directory in directories) or "no checkpoint"
        directories = [
            directory
            for directory in directories
            if directory.name.removesuffix(REPLACED) == checkpoint_name(iteration)
        ]
        if not directories:
            raise ValueError(f"ckpt-step={iteration} is not in {root}, which has {there}: name one that is")
    if newest is not None:
        directories = [directory for directory in directories if iteration_of(directory) <= newest]
    if not directories:
        return None
    for directory in directories:
        manifest, problem = _read(directory)
        if problem is None:
            names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
            problem = first_problem(damage(directory, manifest, names))
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
    except ValueError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise ValueError(problem)
    engine.refresh()


@torch.no_grad()
def _fill(engine: Engine, reader: CheckpointReader, weights_only: bool) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    optimizer, slices = engine.optimizer, engine.parameter_slices()
    stored = {part.name: EMBEDDING if is_tied_copy(part.parameter) else part.name for part in slices}
    trained = [] if weights_only else [part for part in slices if part.parameter.requires_grad]
    kinds = {part.name: reader.kinds[stored[part.name]] for part in trained}
    prepare_states(optimizer, slices, kinds)
    for part in slices:
        name = stored[part.name]
        sharding = sharding_of(name, part.parameter, engine)
        if weights_only and not _is_stored(name, sharding, reader):
            continue
        for kind, value in slice_states(optimizer, part).items():
            if kind == WEIGHT or kind in reader.kinds[name] - {STEP}:  # no state: it was never updated
                value.copy_(reader.read_for(sharding, rank, kind, name, part.offset, part.length))
        if STEP in reader.kinds[name] and part.name in kinds:
            step = optimizer.state[part.updated][STEP]
            step.fill_(max(step.item(), reader.scalar(name)))
    for name, buffer in persistent_buffers(engine):
        sharding = Sharding(tuple(buffer.shape))
        if weights_only and not _is_stored(name, sharding, reader):
            continue
        buffer.copy_(reader.read_for(sharding, 0, BUFFER, name, 0, buffer.numel()).view_as(buffer))


def _is_stored(name: str, sharding: Sharding, reader: CheckpointReader) -> bool:
    """Whether fine-tuning finds it: everything but a router of another kind, which begins as in a new run."""
    stored = reader.manifest.parameters.get(name)
    return stored is not None and stored.unpadded == sharding.unpadded


def _named(root: Path, all_of_them: bool) -> list[Path]:
    if (root / MANIFEST).exists():
        return [root]
    return checkpoints(root) if all_of_them else candidates(root)


def _read(directory: Path) -> tuple[Manifest | None, str | None]:
    """Rank 0's reading of the manifest, or what is wrong with it."""
    manifest, problem = None, None
    if dist.get_rank() == 0:
        try:
            manifest = read_manifest(directory)
        except ValueError as error:
            problem = str(error)
    return from_rank_0((manifest, problem))
