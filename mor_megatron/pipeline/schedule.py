"""All micro-batches of an iteration through Megatron-core's schedules: none, 1F1B, or interleaved for the ring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.pipeline.ring import Chunk, MicroBatch
from mor_megatron.planning.stages import microbatch_group_size
from mor_megatron.recursion.context import RoutingContext

MakeContext = Callable[[], RoutingContext]
Loss = Callable[[Tensor, Batch], Tensor]


def run_schedule(
    model: MoRModel,
    micro_batches: Iterable[Batch],
    count: int,
    make_context: MakeContext,
    loss: Loss,
    forward_only: bool = False,
) -> None:
    """Run micro-batches forward and backward; collective over the pipeline.

    Args:
        model: the bare model; DeepSpeed's wrapper would add hooks for a backward that it does not run.
        micro_batches: of this rank, on its device; all ranks of a pipeline and of a tensor-parallel group pass the
            same. Without a pipeline, each is asked for when the one before has been computed.
        count: how many there are.
        make_context: makes the routing options of a micro-batch; called once for each, on every rank.
        loss: per-token losses [B, S] and their batch -> the scalar to call backward on, used as it is. Called where
            the head is.
        forward_only: no backward pass.
    """
    if model.pipeline.num_stages == 1:

        def whole_step(iterator: Iterator[Batch], model: MoRModel):
            batch = next(iterator)
            return model(batch, make_context()), _loss_function(loss, batch)

        get_forward_backward_func()(
            forward_step_func=whole_step,
            data_iterator=iter(micro_batches),
            model=model,
            forward_only=forward_only,
            num_microbatches=count,
            seq_length=0,  # these two are not read without a pipeline
            micro_batch_size=0,
        )
        return

    micros = [MicroBatch.start(model, batch, make_context()) for batch in micro_batches]
    rows, columns = micros[0].batch.tokens.shape
    chunks = [Chunk(model, chunk) for chunk in range(model.pipeline.num_chunks)]
    config = _pipeline_config(model, len(micros))
    for chunk in chunks:
        chunk.config = config

    def chunk_step(iterator: Iterator[MicroBatch], chunk: Chunk):
        micro = next(iterator)
        return chunk(micro), _loss_function(loss, micro.batch)

    virtual = len(chunks) if len(chunks) > 1 else None
    get_forward_backward_func(pp_size=model.pipeline.num_stages, vp_size=virtual)(
        forward_step_func=chunk_step,
        data_iterator=[iter(micros) for _ in chunks],
        model=chunks,
        forward_only=forward_only,
        p2p_communicator=MessageCommunicator(config, model, micros),
        pg_collection=_process_groups(),
        num_microbatches=count,
        seq_length=columns,
        micro_batch_size=rows,
    )


def _loss_function(loss: Loss, batch: Batch) -> Callable:
    def function(losses: Tensor):
        # Also a token count, which the schedule adds up for who wants it, and what it collects.
        return loss(losses, batch), torch.zeros((), dtype=torch.int), {}

    return function


class MessageCommunicator(P2PCommunicator):
    """Megatron-core's communicator, which knows the shape of every message instead of asking for it.

    Messages are received in the order of the schedule's table, each rank forward and backward; the base class would
    send the three numbers of each shape before the message.
    """

    def __init__(self, config: TransformerConfig, model: MoRModel, micros: list[MicroBatch]):
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        chunks = model.pipeline.num_chunks
        table = get_schedule_table(len(micros), chunks, config.microbatch_group_size_per_vp_stage)
        first, last = model.is_first_stage, model.is_last_stage
        # The first rank receives what the last one sent in the chunk before, and the other way round in backward.
        forward = [(m, chunk - first) for m, chunk in table if not first or chunk > 0]
        backward = [(m, chunks - 1 - chunk) for m, chunk in table]
        backward = [(m, chunk) for m, chunk in backward if not last or chunk < chunks - 1]
        self.forward_shapes = self._shapes(model, micros, forward, first)
        self.backward_shapes = self._shapes(model, micros, backward, last)

    @staticmethod
    def _shapes(
        model: MoRModel, micros: list[MicroBatch], order: list[tuple[int, int]], to_first: bool
    ) -> Iterator[tuple[int, int]]:
        # Lazy: how many rows of a token-choice micro-batch come is known after its first chunk.
        for m, chunk in order:
            yield micros[m].messages.num_rows(chunk, to_first), model.config.hidden_size

    def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        return (
            next(self.forward_shapes) if recv_prev else None,
            next(self.backward_shapes) if recv_next else None,
        )


def _pipeline_config(model: MoRModel, num_microbatches: int) -> TransformerConfig:
    """The schedule's configuration. The layers' own says that there is no pipeline; the checks there do not apply."""
    stages, chunks = model.pipeline.num_stages, model.pipeline.num_chunks
    config = copy.copy(model.config)
    config.pipeline_model_parallel_size = stages
    config.pipeline_dtype = config.params_dtype
    config.variable_seq_lengths = True  # ask MessageCommunicator for shapes
    # Batched messages give wrong gradients in an interleaved pipeline of two ranks.
    config.batch_p2p_comm = False
    config.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
    config.overlap_p2p_comm = overlaps_messages(model.run_config)
    config.microbatch_group_size_per_vp_stage = num_microbatches
    if chunks > 1:
        config.microbatch_group_size_per_vp_stage = microbatch_group_size(num_microbatches, stages)
    # Its storage is exchanged while gloo may still be sending it.
    config.deallocate_pipeline_outputs = False
    return config


def overlaps_messages(config: Config) -> bool:
    """Whether a rank computes while its messages are on their way; only the interleaved schedule of a ring can."""
    return config.is_ring and config.parallel.overlap_p2p_comm != "off"


def _process_groups() -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups
