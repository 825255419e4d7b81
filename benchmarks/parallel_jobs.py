"""The processes of `parallel.py`: a layout, its model, and what each rank does and reports."""

from __future__ import annotations

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from footprint import Traffic, gradients, nbytes, optimizer_state, resident_peak, weights
from megatron.core import parallel_state
from processor import processor
from torch import nn

from mor_megatron.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecursionConfig,
    TrainingConfig,
)
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import num_microbatches, train_step

FOOTPRINT, CLOCK = "footprint", "clock"
LEARNING_RATE = 1e-3
TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Layout:
    """How a run is divided among ranks."""

    name: str
    dp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    zero: int = 1
    tied: bool = False
    """Whether to use DeepSpeed's PipelineModule with tied layers instead of our pipeline."""
    routing: Literal["none", "expert_choice"] = "none"

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.dp * self.tp * self.pp


@dataclass(frozen=True)
class Settings:
    """The models: one in which weights dominate memory, and one small enough for its work to fit the clock."""

    forward_ms: float = 150.0
    backward_ms: float = 300.0
    num_recursions: int = 3
    num_layers: int = 14
    hidden_size: int = 384
    ffn_hidden_size: int = 1024
    vocab_size: int = 4096
    seq_length: int = 128
    global_batch_size: int = 8
    clock_hidden_size: int = 64
    clock_seq_length: int = 48
    clock_microbatches: int = 8
    clock_iterations: int = 4

    def config(self, layout: Layout, tiny: bool) -> Config:
        """The validated run of a layout: middle_cycle with a block of four layers, micro-batches of one sequence."""
        hidden = self.clock_hidden_size if tiny else self.hidden_size
        length = self.clock_seq_length if tiny else self.seq_length
        return validate(
            Config(
                model=ModelConfig(
                    num_layers=self.num_layers,
                    hidden_size=hidden,
                    ffn_hidden_size=hidden * 2 if tiny else self.ffn_hidden_size,
                    num_attention_heads=4 if tiny else hidden // 64,
                    max_position_embeddings=length,
                    vocab_size=128 if tiny else self.vocab_size,
                ),
                recursion=RecursionConfig(num_recursions=self.num_recursions, routing=layout.routing),
                data=DataConfig(seq_length=length),
                optimizer=OptimizerConfig(clip_grad=0.0),
                training=TrainingConfig(
                    micro_batch_size=1,
                    global_batch_size=layout.dp * self.clock_microbatches if tiny else self.global_batch_size,
                    zero_stage=layout.zero,
                ),
                parallel=ParallelConfig(
                    tensor_model_parallel_size=layout.tp,
                    sequence_parallel=layout.sequence_parallel,
                    pipeline_model_parallel_size=layout.pp,
                ),
            ),
            layout.world_size,
        )

    def clock_seconds(self, layout: Layout) -> tuple[float, float]:
        """Set time of a forward and a backward chunk; a tied stage does the work of all chunks of a ring rank."""
        turns = self.num_recursions if layout.tied else 1
        return turns * self.forward_ms / 1e3, turns * self.backward_ms / 1e3

    def kept(self, recursion: int) -> int:
        """k_r: tokens that the default capacities of expert-choice routing keep of a sequence of the tiny model."""
        return self.clock_seq_length * (self.num_recursions - recursion) // self.num_recursions

    def describe(self) -> str:
        """Processor, versions and sizes of the measurement."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "deepspeed"))
        return (
            f"{processor()}, {os.cpu_count()} cores, 1 thread a process, gloo, {versions}; {self.num_layers} layers, "
            f"Nr={self.num_recursions}, hidden {self.hidden_size}, ffn {self.ffn_hidden_size}, vocabulary "
            f"{self.vocab_size}, sequence {self.seq_length}, global batch {self.global_batch_size} in micro-batches of "
            f"1, fp32, AdamW; clock: {self.forward_ms:g} ms forward, {self.backward_ms:g} ms backward a chunk, "
            f"{self.clock_microbatches} micro-batches, {self.clock_iterations - 1} iterations after a first"
        )


def run_ranks(world_size: int, work: Callable[..., dict], *arguments: Any) -> list[dict]:
    """Run `work(*arguments)` in new processes with a process group, and return what each rank reports, in rank order.

    Args:
        work: a function of a module; its report consists of JSON types.
    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the others are stopped.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as directory:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        mp.spawn(_rank, (world_size, directory, work, arguments), nprocs=world_size)
        files = [Path(directory) / f"{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text()) for file in files]


def _rank(rank: int, world_size: int, directory: str, work: Callable[..., dict], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", timeout=TIMEOUT)
    report = work(*arguments)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def perform(job: str, layout: Layout, settings: Settings) -> dict:
    """Run one rank's part of a job, in a process group of the layout's size; its report consists of JSON types."""
    config = settings.config(layout, tiny=job == CLOCK)
    # In DeepSpeed's pipeline, our layers see a world without model parallelism; DeepSpeed makes its own groups.
    initialize_distributed(Config() if layout.tied else config)
    return (footprint if job == FOOTPRINT else clocked)(layout, settings, config)


class Run:
    """A layout's engine and its iterations, ours or DeepSpeed's pipeline."""

    def __init__(self, layout: Layout, config: Config):
        self.config, self.tied = config, layout.tied
        if layout.tied:
            from tied_pipeline import build_tied_pipeline

            self.count = config.training.global_batch_size
            self.engine = build_tied_pipeline(config, self.count)
            self.share = 0
        else:
            self.count = num_microbatches(config)
            self.engine = build_engine(build_model(config), config)
            self.engine.module.train()
            self.share = parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(0)
        shape = (config.training.global_batch_size, config.data.seq_length)
        self.tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches."""
        for tokens in self.tokens.split(1)[self.share * self.count :][: self.count]:
            yield Batch(tokens, tokens.roll(-1, dims=1))

    def iterate(self, iteration: int) -> float:
        """One training iteration; the loss of the global batch."""
        if self.tied:
            from tied_pipeline import train_iteration

            return train_iteration(self.engine, list(self.batches()), LEARNING_RATE)
        return train_step(self.engine, self.batches(), self.config, iteration, LEARNING_RATE).lm_loss


def footprint(layout: Layout, settings: Settings, config: Config) -> dict:
    """Bytes that this rank holds and sends, in the second of two iterations."""
    connected = resident_peak()
    run = Run(layout, config)
    deepspeed = run.engine if layout.tied else run.engine.deepspeed
    held = [0]

    def weighing(method):
        def call(*args, **kwargs):
            held.append(nbytes(gradients(deepspeed)))
            return method(*args, **kwargs)

        return call

    # Measured before the reduction, and between it and the update; DeepSpeed's pipeline has no step().
    deepspeed.step, deepspeed._take_model_step = weighing(deepspeed.step), weighing(deepspeed._take_model_step)
    run.iterate(1)
    traffic = Traffic()
    with traffic.installed(), _tied_sums_named(layout, traffic):
        loss = run.iterate(2)
    module = run.engine.module
    return {
        "loss": loss,
        "weights": nbytes(weights(module)),
        "layer_weights": nbytes(weights(module)) - _vocabulary_bytes(module),
        "gradients": max(held),
        "optimizer": nbytes(optimizer_state(deepspeed)),
        "peak": resident_peak() - connected,
        "sent": dict(traffic.sent),
    }


def clocked(layout: Layout, settings: Settings, config: Config) -> dict:
    """Run iterations of the tiny model under the clock."""
    from schedule_clock import Clock

    run = Run(layout, config)
    stage = dist.get_rank() if layout.tied else parallel_state.get_pipeline_model_parallel_rank()
    clock = Clock(stage, *settings.clock_seconds(layout))
    with clock.on_deepspeed() if layout.tied else clock.on_megatron():
        for iteration in range(1, 1 + settings.clock_iterations):
            dist.barrier()
            run.iterate(iteration)
    return {"events": [asdict(event) for event in clock.events]}


def _vocabulary_bytes(module: nn.Module) -> int:
    """Bytes of embedding and head; not by storages, because ZeRO keeps all weights in one storage."""
    names = [name for name, _ in module.named_parameters()]
    of_vocabulary = [
        w for name, w in zip(names, weights(module), strict=True) if "embedding" in name or "output_layer" in name
    ]
    return sum(w.numel() * w.element_size() for w in of_vocabulary)


def _tied_sums_named(layout: Layout, traffic: Traffic):
    if not layout.tied:
        return contextlib.nullcontext()
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
    from tied_pipeline import around_instruction

    def named(original):
        def instruction(engine):
            with traffic.named("tied gradients"):
                original(engine)

        return instruction

    return around_instruction(ReduceTiedGrads, named)
