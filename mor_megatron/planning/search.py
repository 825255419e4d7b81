"""Which layouts of a run fit into the memory of its ranks, and which of them should be fastest.

Every layout is one that `check_layout` and `check_batch` let pass. Nothing is built or run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from mor_megatron.config.deepspeed_settings import check_engine
from mor_megatron.config.layout import data_parallel_size, fits
from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import layer_work, training_flops_per_token
from mor_megatron.planning.communication import Traffic, traffic
from mor_megatron.planning.machines import GB, Machine
from mor_megatron.planning.memory import RankMemory, num_microbatches, rank_memory, trained_parameters
from mor_megatron.planning.stages import PipelinePlan, pipeline_plan
from mor_megatron.planning.step_time import StepTime, stage_time, step_time
from mor_megatron.planning.teacher import beside

FREE = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "zero_stage",
    "micro_batch_size",
    "recompute_granularity",
    "recompute_unit",
)
"""Settings that a search chooses."""

RECOMPUTATION = (
    {"recompute_granularity": None, "recompute_unit": "layer"},
    {"recompute_granularity": "selective", "recompute_unit": "layer"},
    {"recompute_granularity": "full", "recompute_unit": "layer"},
    {"recompute_granularity": "full", "recompute_unit": "recursion"},
)


WORTH = 0.95
"""A slower layout is listed if it needs less than this part of the memory."""


@dataclass(frozen=True)
class Candidate:
    """A layout and what is expected of it."""

    config: Config
    world_size: int
    memory: RankMemory
    """Of the rank that needs most."""
    traffic: Traffic
    """Of the rank that sends most."""
    time: StepTime
    teacher: Config | None = None
    """Settings of a teacher, as it stands beside the model."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that process different sequences."""
        return data_parallel_size(self.config, self.world_size)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.config.training.global_batch_size * self.config.data.seq_length / self.time.total

    @cached_property
    def flops(self) -> float:
        """Executed by all ranks in an iteration, recomputation included."""
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        return training_flops_per_token(self.config, teacher=self.teacher).hardware * tokens

    def mfu(self, machine: Machine) -> float:
        """Model FLOPs utilisation: of the peak, what the model needs, recomputation left out."""
        needed = training_flops_per_token(self.config, teacher=self.teacher).model * self.tokens_per_second
        return needed / (self.world_size * machine.tflops(self.config.training.precision) * 1e12)

    def flags(self) -> str:
        """The layout as flags of pretrain_mor.py."""
        parallel, training = self.config.parallel, self.config.training
        words = [f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}"]
        words += ["--sequence-parallel"] if parallel.sequence_parallel else []
        words += [f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}"]
        words += [f"--zero-stage {training.zero_stage}", f"--micro-batch-size {training.micro_batch_size}"]
        if training.recompute_granularity is not None:
            words.append(f"--recompute-granularity {training.recompute_granularity}")
        if training.recompute_granularity == "full":
            words.append(f"--recompute-unit {training.recompute_unit}")
        return " ".join(words)


def search(
    config: Config,
    world_size: int,
    machine: Machine,
    fixed: frozenset[str] = frozenset(),
    teacher: Config | None = None,
) -> list[Candidate]:
    """All layouts that can run, whether they fit or not, fastest first.

    Args:
        config: its model validated, its vocabulary resolved, its global batch set.
        fixed: settings of `FREE` that stay as they are in `config`.
        teacher: settings of the model of `distill_from`.
    """
    evaluate = Evaluation(world_size, machine, teacher)
    found = [evaluate(candidate) for candidate in _layouts(config, world_size, machine, fixed)]
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.memory.total))


def usable_bytes(machine: Machine) -> float:
    """Memory of a rank that tensors can have.

    Raises:
        ValueError: it has none.
    """
    if machine.memory_gb <= machine.reserved_gb:
        raise ValueError(
            f"memory={machine.memory_gb:g}GB leaves nothing beside reserved-gb={machine.reserved_gb:g}: give more "
            "--memory, or --set reserved-gb=0.5"
        )
    return (machine.memory_gb - machine.reserved_gb) * GB


def worthwhile(found: list[Candidate]) -> list[Candidate]:
    """Those that save memory, beside every faster one with the same ranks and ZeRO stage; in the same order."""
    least: dict[tuple, float] = {}
    kept = []
    for one in found:
        parallel, training = one.config.parallel, one.config.training
        kind = parallel, training.zero_stage
        if one.memory.total < WORTH * least.get(kind, math.inf):
            least[kind] = one.memory.total
            kept.append(one)
    return kept


def _layouts(config: Config, world_size: int, machine: Machine, fixed: frozenset[str]) -> Iterator[Config]:
    parallel, training, plan = config.parallel, config.training, config.plan
    divisors = [size for size in range(1, max(machine.node_size, plan.block_size) + 1) if world_size % size == 0]
    choices = {
        "tensor_model_parallel_size": [size for size in divisors if size <= machine.node_size],
        "sequence_parallel": [True, False],
        "pipeline_model_parallel_size": [size for size in divisors if size <= plan.block_size],
        "zero_stage": [0, 1, 2, 3],
        "micro_batch_size": [2**exponent for exponent in range(8)],
    }
    settings = vars(parallel) | vars(training)
    choices |= {name: [settings[name]] for name in choices if name in fixed}
    recomputation = [
        choice for choice in RECOMPUTATION if all(getattr(training, k) == v for k, v in choice.items() if k in fixed)
    ]
    for tp, sp, pp, zero, size in product(*choices.values()):
        if sp and tp == 1 and "sequence_parallel" not in fixed:
            continue
        cut = replace(
            parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=sp and tp > 1,
            pipeline_model_parallel_size=pp,
            pipeline_layers=parallel.pipeline_layers if parallel.pipeline_model_parallel_size == pp else None,
        )
        for again in recomputation:
            batch = replace(training, zero_stage=zero, micro_batch_size=size, **again)
            candidate = replace(config, parallel=cut, training=batch)
            vars(candidate)["plan"] = plan  # does not depend on the layout, and takes time
            if not _runs(candidate, world_size):
                break  # whatever is recomputed
            yield candidate


def _runs(config: Config, world_size: int) -> bool:
    if not fits(config, world_size):
        return False
    try:
        check_engine(config)
    except ValueError:
        return False
    return True


class Evaluation:
    """What is expected of layouts of one model."""

    def __init__(self, world_size: int, machine: Machine, teacher: Config | None = None):
        self.world_size, self.machine, self.teacher = world_size, machine, teacher
        self._pipelines: dict[tuple, PipelinePlan] = {}
        self._work: list | None = None

    def __call__(self, config: Config) -> Candidate:
        """Memory, bytes sent and time of a layout that can run."""
        machine, world_size = self.machine, self.world_size
        pipeline, count = self._pipeline(config), num_microbatches(config, world_size)
        self._work = self._work or layer_work(config)
        memories, sent, times, updated = [], [], [], []
        for stage in sorted({0, min(1, pipeline.num_stages - 1), pipeline.num_stages - 1}):  # one of each kind
            memories.append(rank_memory(config, pipeline, stage, world_size, machine.is_cuda))
            updated.append(trained_parameters(config, pipeline, stage))
            parameters = memories[-1].state.parameters
            sent.append(traffic(config, pipeline, stage, parameters, count, world_size, updated[-1]))
            times.append(stage_time(config, pipeline, stage, machine, sent[-1].tensor / count, self._work))
        memory = max(memories, key=lambda one: one.total)
        most = max(sent, key=lambda one: one.total)
        time = step_time(config, pipeline, times, most, max(updated), world_size, machine)
        return Candidate(config, world_size, memory, most, time, pipeline.teacher)

    def _pipeline(self, config: Config) -> PipelinePlan:
        key = (config.parallel.pipeline_model_parallel_size, config.parallel.pipeline_layers)
        if key not in self._pipelines:
            self._pipelines[key] = pipeline_plan(config)
        if self.teacher is None:
            return self._pipelines[key]
        return replace(self._pipelines[key], teacher=beside(config, self.teacher))
