"""Bytes that a rank sends in one iteration, by purpose, with the ring algorithms of collectives.

In a group of n, an all-reduce of b bytes sends 2 b (n-1)/n, an all-gather or reduce-scatter b (n-1)/n.

- *tensor*: a layer has two all-reduces of its rows forward and two backward; recomputation repeats those of the forward
  pass. With sequence parallelism each is an all-gather and a reduce-scatter, and the backward pass gathers two inputs
  once more. So has the head; the embedding has one all-reduce. A teacher has those of a forward pass. An adapter has
  one all-reduce of rows as wide as its rank, forward or backward. With sequence parallelism it has a gather and a
  scatter, and the fp32 gradients of factors that every rank has are summed; those of norms and routers are few, and not
  counted.
- *pipeline*: the message of each chunk (docs/parallelism.md), and its gradient on the way back.
- *embedding*: the fp32 gradient of a tied head, over first and last stage.
- *data*: ZeRO 0 all-reduces fp32 gradients once, ZeRO 1 also gathers updated weights, ZeRO 2 reduces in every
  micro-batch. ZeRO 3 scatters gradients in every micro-batch, and gathers weights twice (forward, backward), those of a
  shared block in every recursion unless DeepSpeed keeps them (`LIVE_WEIGHTS`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.config.layout import data_parallel_size
from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import (
    ROW_PARALLEL,
    active_fraction,
    adapted_maps,
    adapter_parameters,
    layer_parameters,
    padded_vocab_size,
    planned_fractions,
    relaxation_parameters,
)
from mor_megatron.planning.stages import PipelinePlan

LIVE_WEIGHTS = 1_000_000_000
"""Weights that DeepSpeed's ZeRO 3 keeps gathered if they will be used again (its default)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an iteration."""

    tensor: float
    pipeline: float
    embedding: float
    data: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.pipeline + self.embedding + self.data


def traffic(
    config: Config,
    pipeline: PipelinePlan,
    stage: int,
    parameters: int,
    num_microbatches: int,
    world_size: int,
    trained: int | None = None,
) -> Traffic:
    """What each rank of a stage sends.

    Args:
        parameters: weights on the rank, in number (`memory.rank_parameters`).
        num_microbatches: of the rank in the iteration.
        trained: how many of the weights have gradients; None: all.
    """
    trained = parameters if trained is None else trained
    return Traffic(
        tensor=num_microbatches * _tensor(config, pipeline, stage) + _whole_factors(config, pipeline, stage),
        pipeline=num_microbatches * sum(_sent(config, pipeline, stage)),
        embedding=_embedding(config, pipeline, stage),
        data=_data(config, pipeline, parameters, trained, num_microbatches, data_parallel_size(config, world_size)),
    )


def message_bytes(config: Config, pipeline: PipelinePlan, stage: int) -> tuple[float, ...]:
    """Size of the message that a rank of a stage sends in each chunk; the last of the last stage sends none."""
    parallel, last = config.parallel, pipeline.num_chunks - 1
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = config.training.micro_batch_size * config.data.seq_length
    row = config.model.hidden_size * (2 if config.training.precision != "fp32" else 4)
    is_last = stage == pipeline.num_stages - 1
    sizes = []
    for chunk in range(pipeline.num_chunks):
        fraction = planned_fractions(config)[chunk] if pipeline.is_ring else 1.0
        stream = 1.0 if chunk == last and config.routing_method.routes and not is_last else 0.0
        sizes.append(0.0 if is_last and chunk == last else tokens * row * (fraction + stream) / cut)
    return tuple(sizes)


def _sent(config: Config, pipeline: PipelinePlan, stage: int) -> list[float]:
    """Forward messages of a micro-batch, and gradients of those received."""
    if pipeline.num_stages == 1:
        return []
    forward = message_bytes(config, pipeline, stage)
    before = message_bytes(config, pipeline, stage - 1 if stage > 0 else pipeline.num_stages - 1)
    return [
        *forward,
        *before,
    ]  # the first stage receives nothing in its first chunk, and the last sends none in its last


def _tensor(config: Config, pipeline: PipelinePlan, stage: int) -> float:
    """Of one micro-batch."""
    tp, parallel = config.parallel.tensor_model_parallel_size, config.parallel
    if tp == 1:
        return 0.0
    tokens = config.training.micro_batch_size * config.data.seq_length
    row = config.model.hidden_size * (2 if config.training.precision != "fp32" else 4)
    fractions = planned_fractions(config)
    half = tokens * row * (tp - 1) / tp  # a gather, or a scatter
    uses = sum(
        active_fraction(layer, fractions)
        for chunk in range(pipeline.num_chunks)
        for layer in pipeline.layers(stage, chunk)
    )
    again = 4 if config.training.recompute_granularity == "full" else 0
    sent = uses * half * (again + (10 if parallel.sequence_parallel else 8)) + _of_adapters(config, pipeline, stage)
    if stage == 0:
        sent += 2 * half
    if stage == pipeline.num_stages - 1:
        sent += half * (3 if parallel.sequence_parallel else 2) + _of_teacher(pipeline.teacher)
    return sent


def _of_teacher(teacher: Config | None) -> float:
    """Of one micro-batch: those of a forward pass."""
    if teacher is None:
        return 0.0
    tp, fractions = teacher.parallel.tensor_model_parallel_size, planned_fractions(teacher)
    tokens = teacher.training.micro_batch_size * teacher.data.seq_length
    row = teacher.model.hidden_size * (2 if teacher.training.precision != "fp32" else 4)
    uses = sum(active_fraction(layer, fractions) for layer in teacher.plan.layers)
    gathered = 1 if teacher.parallel.sequence_parallel else 0  # what its head reads
    return tokens * row * (tp - 1) / tp * (4 * uses + 2 + gathered)


def _of_adapters(config: Config, pipeline: PipelinePlan, stage: int) -> float:
    """Of one micro-batch: rows as wide as the rank."""
    tp, sequence_parallel = config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel
    fractions, halves = planned_fractions(config), 0.0
    for chunk in range(pipeline.num_chunks):
        for layer in pipeline.layers(stage, chunk):
            parts = adapted_maps(config, layer)
            forward = len(parts) if sequence_parallel else 2 * len([part for part in parts if part in ROW_PARALLEL])
            again = forward if config.training.recompute_granularity == "full" else 0
            halves += active_fraction(layer, fractions) * (2 * len(parts) + again)
    number = 2 if config.training.precision != "fp32" else 4
    tokens = config.training.micro_batch_size * config.data.seq_length
    return halves * tokens * config.recursion.lora_rank * number * (tp - 1) / tp


def _whole_factors(config: Config, pipeline: PipelinePlan, stage: int) -> float:
    """Of an iteration."""
    tp, (_, whole) = config.parallel.tensor_model_parallel_size, adapter_parameters(config)
    is_summed = tp > 1 and config.parallel.sequence_parallel
    return 2 * 4.0 * pipeline.block_layers[stage] * whole * (tp - 1) / tp if is_summed else 0.0


def _embedding(config: Config, pipeline: PipelinePlan, stage: int) -> float:
    is_end = stage in (0, pipeline.num_stages - 1)
    is_untied = config.model.untie_embeddings_and_output_weights
    if pipeline.num_stages == 1 or not is_end or is_untied or config.optimizer.freeze != "none":
        return 0.0
    tp = config.parallel.tensor_model_parallel_size
    padded = padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by, tp)
    return 4.0 * padded // tp * config.model.hidden_size


def _data(
    config: Config, pipeline: PipelinePlan, parameters: int, trained: int, num_microbatches: int, ranks: int
) -> float:
    training = config.training
    share, number = (ranks - 1) / ranks, 2 if training.precision != "fp32" else 4
    weights, gradients = number * trained, 4 * trained
    if training.zero_stage == 0:
        return 2 * gradients * share
    if training.zero_stage == 1:
        return (2 * gradients + weights) * share
    if training.zero_stage == 2:
        return (2 * gradients * num_microbatches + weights) * share
    gathered = parameters
    if parameters > LIVE_WEIGHTS:
        tp = config.parallel.tensor_model_parallel_size
        block = pipeline.plan.block_size * (layer_parameters(config, tp) + relaxation_parameters(config, tp))
        again = 1 if training.recompute_granularity != "full" else 2
        gathered = (1 + again) * (parameters + (pipeline.plan.num_recursions - 1) * block)
    return num_microbatches * share * (gradients + gathered * number)
