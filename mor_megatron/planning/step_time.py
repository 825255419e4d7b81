"""How long an iteration takes on a machine, by arithmetic.

A micro-batch takes on one stage the time of its products and its attention at their rates, of its element-wise passes
at the speed of memory, of its operators' starts, and of the exchanges between tensor-parallel ranks, one after another.
The slowest stage sets the pace. In a pipeline a rank waits while its first micro-batch comes and its last one goes: P-1
passes, in the ring of recursion 0, which has the most tokens. Reduction and update come after the last backward pass,
except that ZeRO 2 and 3 can reduce while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.config.deepspeed_settings import overlaps_reduction
from mor_megatron.config.layout import data_parallel_size
from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import (
    FORWARDS_PER_STEP,
    LayerWork,
    Widths,
    active_fraction,
    adapted_maps,
    head_training_flops_per_token,
    layer_work,
    planned_fractions,
)
from mor_megatron.planning.communication import Traffic
from mor_megatron.planning.machines import GB, Machine
from mor_megatron.planning.memory import num_microbatches
from mor_megatron.planning.stages import PipelinePlan, pipeline_plan

# Numbers read and written by element-wise operators of one use of a layer, forward and backward, for each of its rows:
# two norms and two residual additions, SwiGLU, rotation. How many operators there are, without adapters and for each of
# them. And the passes of the loss over the logits.
STREAM_PASSES, FFN_PASSES, QKV_PASSES, OPERATORS, ADAPTER_OPERATORS, LOGIT_PASSES = 46, 16, 10, 97, 12, 10
LEAST_SHOWN = 0.1
"""Part of an exchange that lengthens the computation beside it at least: both need processors and memory."""
UPDATE_BYTES = 36
"""Read and written for one parameter by AdamW, the norm and clipping of its gradient, and the cast of its weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one iteration on the slowest rank."""

    compute: float
    """Products, attention, element-wise passes."""
    tensor: float
    """Exchanges between tensor-parallel ranks."""
    idle: float
    """Waiting for the pipeline."""
    pipeline: float
    """Messages that nothing hides."""
    data: float
    """Reduction over data-parallel ranks that nothing hides."""
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.tensor + self.idle + self.pipeline + self.data + self.update

    @property
    def idle_share(self) -> float:
        """Part of the iteration in which a rank waits for the pipeline."""
        return self.idle / self.total


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one stage, forward and backward."""

    chunks: tuple[float, ...]
    """By chunk, with their exchanges."""
    tensor: float
    """Of these, exchanges between tensor-parallel ranks."""


def stage_time(
    config: Config, pipeline: PipelinePlan, stage: int, machine: Machine, tensor_bytes: float, work: list[LayerWork]
) -> StageTime:
    """Time of one micro-batch on each rank of a stage.

    Args:
        tensor_bytes: sent to tensor-parallel ranks for one micro-batch.
        work: `layer_work(config)`.
    """
    training, parallel, widths = config.training, config.parallel, Widths.of(config)
    tp = parallel.tensor_model_parallel_size
    cut = tp if parallel.sequence_parallel else 1
    tokens = training.micro_batch_size * config.data.seq_length
    number = 2 if training.precision != "fp32" else 4
    peak = machine.tflops(training.precision) * 1e12
    products, attending = peak * machine.product_share, peak * machine.attention_share
    passes = number * (
        STREAM_PASSES * widths.hidden / cut
        + (FFN_PASSES * widths.ffn + QKV_PASSES * (widths.query + 2 * widths.key_value)) / tp
    )
    per_byte = machine.elementwise_share / (machine.copy_gbs * machine.copy_share * GB)
    fractions = planned_fractions(config)
    chunks = []
    for chunk in range(pipeline.num_chunks):
        layers = pipeline.layers(stage, chunk)
        seconds = 0.0
        for layer in layers:
            own = work[layer.index]
            linear, attention = own.training(training.recompute_granularity)
            times = 1 if not own.is_reached else FORWARDS_PER_STEP + (training.recompute_granularity == "full")
            seconds += tokens / tp * (linear / products + attention / attending)
            seconds += tokens * active_fraction(layer, fractions) * passes * per_byte * times / FORWARDS_PER_STEP
        adapters = sum(len(adapted_maps(config, layer)) for layer in layers)
        operators = len(layers) * OPERATORS + adapters * ADAPTER_OPERATORS
        chunks.append(seconds + operators * machine.operator_us * 1e-6)
    if stage == pipeline.num_stages - 1:
        head = head_training_flops_per_token(config) / products
        chunks[-1] += tokens / tp * (head + number * LOGIT_PASSES * config.model.vocab_size * per_byte)
        chunks[-1] += _forward_seconds(pipeline.teacher, machine)
    tensor = tensor_bytes / _bandwidth(machine, is_inside=tp <= machine.node_size)
    return StageTime(tuple(seconds + tensor / len(chunks) for seconds in chunks), tensor)


def _forward_seconds(teacher: Config | None, machine: Machine) -> float:
    """Of a teacher for a micro-batch, without its exchanges: a third of what training it would take."""
    if teacher is None:
        return 0.0
    trained = stage_time(teacher, pipeline_plan(teacher), 0, machine, 0.0, layer_work(teacher))
    return sum(trained.chunks) / FORWARDS_PER_STEP


def step_time(
    config: Config,
    pipeline: PipelinePlan,
    stages: list[StageTime],
    traffic: Traffic,
    parameters: int,
    world_size: int,
    machine: Machine,
) -> StepTime:
    """Time of an iteration.

    Args:
        stages: times of all kinds of stages.
        traffic: of the rank that sends most.
        parameters: of the rank that trains most, in number.
    """
    slowest, count = max(stages, key=lambda stage: sum(stage.chunks)), num_microbatches(config, world_size)
    working, tensor = count * sum(slowest.chunks), count * slowest.tensor
    ranks, tp = data_parallel_size(config, world_size), config.parallel.tensor_model_parallel_size
    network = _bandwidth(machine, is_inside=world_size <= machine.node_size)
    messages = traffic.pipeline / network
    if config.is_ring and config.parallel.overlap_p2p_comm != "off":
        messages = _shown(messages, working)
    data = traffic.data / _bandwidth(machine, is_inside=tp * ranks <= machine.node_size)
    if overlaps_reduction(config, machine.is_cuda):
        data = _shown(data, 2 / 3 * working)  # the backward pass
    updated = parameters / (ranks if config.training.zero_stage > 0 else 1)
    return StepTime(
        compute=working - tensor,
        tensor=tensor,
        idle=(pipeline.num_stages - 1) * max(stage.chunks[0] for stage in stages),
        pipeline=messages,
        data=data + traffic.embedding / network,
        update=updated * UPDATE_BYTES / (machine.copy_gbs * machine.copy_share * GB),
    )


def _shown(exchange: float, beside: float) -> float:
    """What an exchange adds to the work beside it."""
    return max(exchange - beside, LEAST_SHOWN * exchange)


def _bandwidth(machine: Machine, is_inside: bool) -> float:
    """Bytes a second that a collective sends."""
    return (machine.link_gbs if is_inside else machine.network_gbs) * machine.link_share * GB
