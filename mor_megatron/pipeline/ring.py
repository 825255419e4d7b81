"""One rank of the pipeline: its chunks, and what it keeps of a micro-batch between them.

In the ring, chunk r of every rank is recursion r. The first rank opens recursions (routes, takes the rows out) and
closes them when the rows have come round; the last rank closes the last one and goes on to the head. Keys and values
that later recursions share stay on the rank that owns the layer. An ordinary pipeline is the same with one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mor_megatron.data.batch import Batch
from mor_megatron.model.attention import AttentionMetadata
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.pipeline.carry import keep
from mor_megatron.pipeline.message import MessageFormat
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.routing import Stream


@dataclass
class MicroBatch:
    """A micro-batch on one rank, through all chunks."""

    batch: Batch
    context: RoutingContext
    metadata: AttentionMetadata
    messages: MessageFormat
    kept: Stream | None = field(default=None)
    """First rank, between two chunks: the open recursion without its rows."""

    @classmethod
    def start(cls, model: MoRModel, batch: Batch, context: RoutingContext) -> MicroBatch:
        """Before its first chunk.

        Raises:
            ValueError: the sequence is longer than max-position-embeddings.
        """
        metadata = model.attention_metadata(batch)
        return cls(batch, context, metadata, MessageFormat(model, context, metadata.all_tokens))


class Chunk(nn.Module):
    """One virtual stage of a rank; all chunks of a rank run the same weights.

    Args:
        model: this rank's part of the model.
        chunk: its number, from 0; in the ring, the recursion.
    """

    def __init__(self, model: MoRModel, chunk: int):
        super().__init__()
        self.model = model
        self.index = chunk
        self.model_type, self.config = model.model_type, model.config  # the schedule asks for them
        self.is_last_chunk = chunk == model.pipeline.num_chunks - 1
        self.received: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """The schedule hands over what the previous rank sent."""
        (self.received,) = input_tensor

    def forward(self, micro: MicroBatch) -> Tensor:
        """The message [R, H] to the next rank, or per-token losses [B, S] at the end of the last chunk."""
        model, metadata = self.model, micro.metadata
        stream = self._open(micro) if model.is_first_stage else micro.messages.unpack(self.received, self.index)
        depth = micro.context.depth(model.plan.num_recursions)
        layers = model.pipeline.layers(model.stage, self.index)
        layers = tuple(layer for layer in layers if layer.recursion is not None and layer.recursion < depth)
        if layers and stream.active.count > 0:
            stream = replace(stream, rows=model.run_layers(layers, stream.rows, metadata, stream.active))
        if model.is_last_stage and self.is_last_chunk:
            metadata.store.clear()
            return model.head(model.router.merged(stream).hidden, metadata, micro.batch)
        message = micro.messages.pack(stream, self.index, to_first=model.is_last_stage)
        if torch.is_grad_enabled() and not message.requires_grad:
            message.requires_grad_()  # frozen so far: the schedule runs a backward pass of every chunk
        return self._keep(micro, stream, message)

    def _open(self, micro: MicroBatch) -> Stream:
        """First rank: the embedding, or the recursion that comes round closed; then the next one opened."""
        model, messages = self.model, micro.messages
        if self.index == 0:
            stream = model.embed(micro.batch, micro.metadata, micro.context)
        else:
            rows = messages.unpack_rows(self.received, micro.kept.active)
            stream = model.router.close(self.index - 1, replace(micro.kept, rows=rows))
        stream = model.router(self.index, stream, micro.context)
        messages.choice = stream.choice
        return stream

    def _keep(self, micro: MicroBatch, stream: Stream, message: Tensor) -> Tensor:
        """The message, tied to what stays here for the next chunk."""
        model, store = self.model, micro.metadata.store
        if self.is_last_chunk:
            store.clear()
            micro.kept = None
            return message
        shared = list(store) if self.index == 0 else []
        tensors: list[Tensor] = [tensor for index in shared for tensor in store[index]]
        if model.is_first_stage:
            tensors += [tensor for tensor in (stream.hidden, stream.gate) if tensor is not None]
        message, leaves = keep(message, tensors)
        for index in shared:
            store[index] = leaves.pop(0), leaves.pop(0)
        if model.is_first_stage:
            hidden = leaves.pop(0) if stream.hidden is not None else None
            gate = leaves.pop(0) if stream.gate is not None else None
            micro.kept = replace(stream, rows=None, hidden=hidden, gate=gate)
        return message
