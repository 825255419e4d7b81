"""Jobs of workers in the checkpoint tests: train and save, or resume, on the samples of each iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from deepspeed.accelerator import get_accelerator
from full_state import gather_buffers, gather_parameters
from layout_runs import run_steps, unique_elements
from torch import Tensor

from mor_megatron.checkpointing.engine_state import slice_states
from mor_megatron.checkpointing.load import load_checkpoint
from mor_megatron.checkpointing.save import Saver
from mor_megatron.config.schema import CheckpointConfig, Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.training.engine import Engine, build_engine
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import StepReport

SAVED_AFTER, UNTIL = 2, 4


@dataclass
class Curve:
    """What a run did after the iteration that was saved."""

    reports: list[StepReport]
    state: dict[str, Tensor]
    """Every slice of this rank's state at the end, and the weights that the model computes with."""
    parameters: dict[str, Tensor]
    """Of the whole model; on rank 0."""
    buffers: dict[str, Tensor]
    elements: int
    """This rank's parameter elements, each storage once."""


def with_directory(config: Config, directory: str, **changes) -> Config:
    return replace(config, checkpoint=CheckpointConfig(save=directory, load=directory, **changes))


def new_engine(config: Config, seed: int | None = None) -> Engine:
    initialize_distributed(config)
    other = config if seed is None else replace(config, training=replace(config.training, seed=seed))
    return build_engine(build_model(other), config)


def allow_fp16() -> None:
    """PyTorch computes fp16 on any CPU, slowly; DeepSpeed refuses those without fp16 instructions."""
    get_accelerator().is_fp16_supported = lambda: True


def save_halfway(config: Config, directory: str, **changes) -> Curve:
    """Train, save after two iterations, and train on."""
    config = with_directory(config, directory, **changes)
    engine = new_engine(config)
    run_steps(engine, config, first=1, count=SAVED_AFTER)
    saver = Saver(engine, config)
    size = config.training.global_batch_size
    saver.save(Progress(iteration=SAVED_AFTER, consumed_samples=SAVED_AFTER * size))
    curve = finish(engine, config)
    saver.finish()
    return curve


def resume(config: Config, directory: str, trained: int = 0) -> Curve:
    """Load into an engine of other weights, that may have been trained before, and train on."""
    config = with_directory(config, directory)
    engine = new_engine(config, seed=config.training.seed + 1)
    run_steps(engine, config, first=4, count=trained)
    progress = load_checkpoint(engine, config)
    size = config.training.global_batch_size
    assert progress == Progress(iteration=SAVED_AFTER, consumed_samples=SAVED_AFTER * size)
    return finish(engine, config)


def copy_through(config: Config, source: str, target: str) -> None:
    """Load a checkpoint and save what was loaded."""
    engine = new_engine(config, seed=config.training.seed + 1)
    progress = load_checkpoint(engine, with_directory(config, source))
    Saver(engine, with_directory(config, target)).save(progress)


def finish(engine: Engine, config: Config) -> Curve:
    reports = run_steps(engine, config, first=SAVED_AFTER + 1, count=UNTIL - SAVED_AFTER)
    parameters, buffers = gather_parameters(engine.module), gather_buffers(engine.module)
    return Curve(reports, local_state(engine), parameters, buffers, unique_elements(engine.module))


def local_state(engine: Engine) -> dict[str, Tensor]:
    """All that this rank keeps, by names that say where it lies."""
    state = {
        f"{part.name} {part.offset} {kind}": value.clone()
        for part in engine.parameter_slices()
        for kind, value in slice_states(engine.optimizer, part).items()
    }
    computed = {name: value for name, value in engine.module.state_dict().items() if torch.is_tensor(value)}
    return state | {f"{name} in the model": value.clone() for name, value in computed.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
