"""Bytes that a rank holds: its state from one iteration to the next, and what is added while one runs.

Bytes of one parameter, with D data-parallel ranks and w = 2 bytes a weight in a bf16 or fp16 run, else 4:

| ZeRO | weights | gradients | moments (AdamW; SGD half) | fp32 copy to update |
|------|---------|-----------|---------------------------|---------------------|
| 0    | w       | 4         | 8                         | 4 if w is 2, else 0 |
| 1    | w       | 4         | 8/D                       | 4/D                 |
| 2    | w       | 4/D       | 8/D                       | 4/D                 |
| 3    | w/D     | 4/D       | 8/D                       | 4/D                 |

These are the modes of training/engine.py; a test measures them on real engines. DeepSpeed pads what it divides to a
few elements more, and has buffers of a fixed size. Activations are those of `planning.activations`, of as many
micro-batches as the pipeline's schedule has under way.

`--dry-run`, the report at the start of a run and `tools/plan.py` all read `rank_memory`. It does not count the
workspace of libraries, the context of a GPU, nor what its allocator loses to fragments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mor_megatron.config.deepspeed_settings import deepspeed_settings, overlaps_reduction
from mor_megatron.config.layout import data_parallel_size
from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import (
    Widths,
    layer_parameters,
    padded_vocab_size,
    recursion_embedding_parameters,
    relaxation_parameters,
    router_parameters,
)
from mor_megatron.planning.activations import activations, adds_each_use, final_norm_bytes, forward_bytes, head_bytes
from mor_megatron.planning.communication import LIVE_WEIGHTS, message_bytes
from mor_megatron.planning.schedule import passes
from mor_megatron.planning.stages import PipelinePlan, pipeline_plan


@dataclass(frozen=True)
class RankState:
    """What one rank holds."""

    parameters: int
    """Weights that it works with, in number; under ZeRO-3 it stores 1/D of them."""
    weights: int
    """Bytes."""
    gradients: int
    """Bytes, all fp32."""
    optimizer: int
    """Bytes of moments and fp32 copies; in CPU memory with --optimizer-cpu-offload."""

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


def rank_parameters(config: Config, pipeline: PipelinePlan, stage: int) -> int:
    """Weights on each tensor-parallel rank of a pipeline stage, vocabulary padding included.

    Matrices, embedding and head are divided among tensor-parallel ranks; norms and routers are whole on each. The first
    stage has the embeddings and the routers, the last the head; a tied head is a weight of its own only if they are two
    ranks.
    """
    tp, hidden = config.parallel.tensor_model_parallel_size, config.model.hidden_size
    padded = padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by, tp)
    is_first, is_last = stage == 0, stage == pipeline.num_stages - 1
    count = len(pipeline.physical_layers(stage)) * layer_parameters(config, tp)
    count += pipeline.block_layers[stage] * relaxation_parameters(config, tp)
    if is_first:
        count += padded // tp * hidden + router_parameters(config) + recursion_embedding_parameters(config)
    if is_last:
        count += hidden  # final norm
        if config.model.untie_embeddings_and_output_weights or not is_first:
            count += padded // tp * hidden
    return count


def trained_parameters(config: Config, pipeline: PipelinePlan, stage: int) -> int:
    """Those of `rank_parameters` that `--freeze` leaves to be trained."""
    freeze = config.optimizer.freeze
    if freeze == "none":
        return rank_parameters(config, pipeline, stage)
    count = pipeline.block_layers[stage] * _trained_of_a_layer(config)
    if stage == 0:
        count += router_parameters(config) + (recursion_embedding_parameters(config) if freeze == "base" else 0)
    return count


def _trained_of_a_layer(config: Config) -> int:
    """The same of a layer of the shared block."""
    freeze, tp = config.optimizer.freeze, config.parallel.tensor_model_parallel_size
    if freeze == "all-but-routers":
        return 0
    relaxation = relaxation_parameters(config, tp)
    if freeze == "none":
        return layer_parameters(config, tp) + relaxation
    first = Widths.of(config).layer_norms if config.recursion.recursion_norms else 0  # norms of the first recursion
    return relaxation + first


def rank_state(config: Config, parameters: int, world_size: int, trained: int | None = None) -> RankState:
    """Bytes for a number of parameters, by the table above.

    Args:
        config: of the run.
        parameters: on the rank.
        world_size: ranks of the run.
        trained: how many of them have gradients and optimizer state; None: all.
    """
    trained = parameters if trained is None else trained
    training = config.training
    shards = [data_parallel_size(config, world_size) if training.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer_shards, gradient_shards, weight_shards = shards
    half = training.precision != "fp32"
    moments = 8 if config.optimizer.optimizer == "adam" else 4
    copy = 4 if half or training.zero_stage > 0 else 0
    return RankState(
        parameters,
        weights=(2 if half else 4) * parameters // weight_shards,
        gradients=4 * trained // gradient_shards,
        optimizer=(moments + copy) * trained // optimizer_shards,
    )


class Moment(NamedTuple):
    """What is there beside the state, in bytes, at a moment of an iteration at which it may be most."""

    name: str
    messages: float
    """Sent and received in a pipeline, and kept until the backward pass."""
    activations: float
    logits: float
    """Final norm, head and loss."""
    working: float
    """Gradients of activations and weights that are being computed, and what recomputation has brought back."""

    @property
    def total(self) -> float:
        """Bytes of all."""
        return self.messages + self.activations + self.logits + self.working


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds at its peak, in bytes."""

    state: RankState
    buffers: float
    """Of DeepSpeed: gradients on their way to other ranks, and weights that ZeRO 3 has gathered."""
    peak: Moment
    is_offloaded: bool = False
    """The optimizer's state is in CPU memory, and not in `total`."""
    teacher: int = 0
    """Weights of the teacher."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        offloaded = self.state.optimizer if self.is_offloaded else 0
        return self.state.total - offloaded + self.teacher + self.buffers + self.peak.total


def rank_memory(config: Config, pipeline: PipelinePlan, stage: int, world_size: int, cuda: bool) -> RankMemory:
    """The peak of each rank of a pipeline stage in an iteration.

    Args:
        config: validated for `world_size` ranks, its vocabulary resolved.
        cuda: whether ranks have CUDA devices, which decides what is `auto`.
    Raises:
        ValueError: too few micro-batches for a ring.
    """
    parameters, trained = (count(config, pipeline, stage) for count in (rank_parameters, trained_parameters))
    state = rank_state(config, parameters, world_size, trained)
    peak = max(_moments(config, pipeline, stage, world_size, cuda), key=lambda moment: moment.total)
    buffers = _reduction_buffers(config, state, cuda) + _gathered_weights(config, state, world_size)
    teacher = _teacher_weights(pipeline, world_size) if stage == pipeline.num_stages - 1 else 0
    return RankMemory(state, buffers, peak, config.training.optimizer_cpu_offload, teacher)


def _teacher_weights(pipeline: PipelinePlan, world_size: int) -> int:
    """Bytes on each rank of the last stage."""
    if pipeline.teacher is None:
        return 0
    parameters = rank_parameters(pipeline.teacher, pipeline_plan(pipeline.teacher), 0)
    return rank_state(pipeline.teacher, parameters, world_size, trained=0).weights


def num_microbatches(config: Config, world_size: int) -> int:
    """Of one rank in one iteration."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


def _moments(config: Config, pipeline: PipelinePlan, stage: int, world_size: int, cuda: bool) -> Iterator[Moment]:
    """The passes of a rank, as the schedule has them."""
    own, waiting = activations(config, pipeline, stage, cuda), _waiting_gradients(config, pipeline, stage)
    has_head, vocabulary = stage == pipeline.num_stages - 1, _trained_vocabulary(config)
    teacher = pipeline.teacher
    head = head_bytes(config, cuda, teacher) if has_head else 0.0
    sent = message_bytes(config, pipeline, stage) if pipeline.num_stages > 1 else (0.0,)
    everything = range(config.recursion.num_recursions)
    live = messages = 0.0
    for step in passes(pipeline, stage, num_microbatches(config, world_size)):
        chunk = max(step, ~step)
        recursions = [chunk] if pipeline.is_ring else everything
        if step >= 0:
            live += sum(own.kept[r] for r in recursions)
            messages += sent[chunk]
            if has_head and chunk == pipeline.num_chunks - 1:
                if teacher is not None:
                    norm, working = final_norm_bytes(config, cuda), forward_bytes(teacher, cuda)
                    yield Moment("forward pass of the teacher", messages, live, norm, working)
                yield Moment("head and loss", messages, live, head, 4.0 * vocabulary)
            continue
        for r in reversed(recursions):
            yield Moment(f"backward pass of recursion {r}", messages, live, 0.0, own.working[r] + waiting[r])
            live -= own.kept[r]
        messages -= sent[chunk]
    if stage == 0 and vocabulary > 0:
        own = vocabulary * (4 if config.training.precision == "fp32" else 6)  # in 16 bits, then in fp32
        waits = 8 * vocabulary if waiting[-1] else 0  # the head's gradient, and its sum with the embedding's
        yield Moment("gradient of the embedding", 0.0, 0.0, 0.0, waits + own)


def _trained_vocabulary(config: Config) -> int:
    """Weights of embedding or head on one tensor-parallel rank; none if they are frozen."""
    if config.optimizer.freeze != "none":
        return 0
    tp = config.parallel.tensor_model_parallel_size
    padded = padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by, tp)
    return padded // tp * config.model.hidden_size


def _waiting_gradients(config: Config, pipeline: PipelinePlan, stage: int) -> list[float]:
    """fp32 sums that wait for further uses of their weights, while the backward pass of each recursion runs."""
    count = config.recursion.num_recursions
    if adds_each_use(config):
        return [0.0] * count
    is_tied = pipeline.num_stages == 1 and not config.model.untie_embeddings_and_output_weights
    head = 4.0 * _trained_vocabulary(config) if is_tied else 0.0
    layers = pipeline.block_layers[stage] if not pipeline.is_ring else 0  # a ring's passes are whole backward passes
    block = 4.0 * layers * _trained_of_a_layer(config)
    return [head + (block if r < count - 1 else 0.0) for r in range(count)]


def _gathered_weights(config: Config, state: RankState, world_size: int) -> float:
    """Those of ZeRO 3, which keeps what it will use again soon: all of a small model."""
    if config.training.zero_stage < 3 or data_parallel_size(config, world_size) == 1:
        return 0.0
    return min(state.parameters, LIVE_WEIGHTS) * (4 if config.training.precision == "fp32" else 2)


def _reduction_buffers(config: Config, state: RankState, cuda: bool) -> float:
    """Where DeepSpeed collects fp32 gradients before it reduces them."""
    training = config.training
    if training.zero_stage == 0 or adds_each_use(config):
        return 0.0
    size = deepspeed_settings(config, cuda)["zero_optimization"]["reduce_bucket_size"]
    is_double = training.zero_stage < 3 and overlaps_reduction(config, cuda)
    reduced = (
        state.gradients if training.zero_stage == 2 and training.precision == "fp32" else 0
    )  # before they are added
    return 4.0 * size * (2 if is_double else 1) + reduced
