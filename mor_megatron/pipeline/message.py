"""What travels between two ranks of the pipeline: one tensor [R, H] for each chunk of a micro-batch.

| part     | rows                  | when                                                                 |
|----------|-----------------------|----------------------------------------------------------------------|
| working  | those of the active   | always                                                               |
| decision | S * B / H             | on the way out, where the ranks cannot know which tokens are active  |
| stream   | S * B                 | in the last chunk only: its last rank closes the recursion           |
| gate     | as working, / H       | with the stream                                                      |

Before the last chunk the first rank keeps stream and gate: it opens each recursion, and closes it when the rows have
come round. A decision consists of small whole numbers, exact in bf16. Under sequence parallelism, a rank sends its
shard of the working rows and of the stream.

Every rank knows the size of a message in advance, from `RoutingMethod.incoming`. Where the number of active tokens is
not known, working rows are padded to the largest number possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens
from mor_megatron.recursion.routing import Stream


@dataclass
class MessageFormat:
    """The messages of one micro-batch, as one rank sees them."""

    model: MoRModel
    context: RoutingContext
    tokens: ActiveTokens
    choice: Any = None
    """What the routing method decided once for all recursions, as soon as it is known here."""

    def __post_init__(self):
        self.num_shards = (
            parallel_state.get_tensor_model_parallel_world_size() if self.model.config.sequence_parallel else 1
        )
        self.method = self.model.router
        self.num_chunks = self.model.pipeline.num_chunks

    def num_rows(self, chunk: int, to_first: bool) -> int:
        """R of a message: of a chunk, from the last rank back `to_first`, or from any other to the next."""
        return max(1, sum(self._parts(chunk, to_first).values()))

    def pack(self, stream: Stream, chunk: int, to_first: bool) -> Tensor:
        """[R, H] of an open recursion whose rows have passed this rank's layers."""
        width = stream.rows.shape[-1]
        filled = []
        for name, size in self._parts(chunk, to_first).items():
            if name == "working":
                part = stream.rows.reshape(-1, width)
            elif name == "decision":
                part = _as_rows(self.method.decision(stream).to(stream.rows), width)
            elif name == "stream":
                part = stream.hidden.reshape(-1, width)
            else:
                part = _as_rows(stream.gate.to(stream.rows.dtype), width)
            filled.append(F.pad(part, (0, 0, 0, size - part.shape[0])) if part.shape[0] < size else part)
        message = torch.cat(filled)
        return message if message.shape[0] > 0 else F.pad(message, (0, 0, 0, 1))

    def unpack(self, message: Tensor, chunk: int) -> Stream:
        """The open recursion in a message, on any rank but the first."""
        sizes = self._parts(chunk, to_first=False)
        parts = dict(zip(sizes, message[: sum(sizes.values())].split(list(sizes.values())), strict=True))
        decision = None
        if "decision" in parts:
            decision = parts["decision"].detach().reshape(-1)[: self.tokens.count].view(self.tokens.shape)
        active, self.choice = self.method.receive(chunk, self.tokens, self.choice, decision, self.context)
        hidden = gate = None
        if "stream" in parts:
            hidden = parts["stream"].view(-1, self.tokens.batch_size, message.shape[-1])
        if "gate" in parts:
            gate = parts["gate"].reshape(-1)[: active.count].view(*active.shape, 1)
        return Stream(self.tokens, active, hidden, self.unpack_rows(message, active), gate, self.choice)

    def unpack_rows(self, message: Tensor, active: ActiveTokens) -> Tensor:
        """The working rows of a message, [k, B, H] or [T, 1, H], or this rank's shard of them."""
        rows, columns = active.shape
        rows = -(-rows // self.num_shards)
        return message[: rows * columns].view(rows, columns, message.shape[-1])

    def _parts(self, chunk: int, to_first: bool) -> dict[str, int]:
        """Number of rows of each part, in the order of the message."""
        width = self.model.config.hidden_size
        incoming = self.method.incoming(chunk, self.tokens, self.choice, self.context)
        rows, columns = incoming.shape
        sizes = {"working": -(-rows // self.num_shards) * columns}
        if to_first:
            return sizes
        if incoming.decides:
            sizes["decision"] = -(-self.tokens.count // width)
        if chunk == self.num_chunks - 1 and self.method.routes:
            sizes["stream"] = self.tokens.seq_length // self.num_shards * self.tokens.batch_size
            if self.method.weighs and rows > 0:
                sizes["gate"] = -(-rows * columns // width)
        return sizes


def _as_rows(values: Tensor, width: int) -> Tensor:
    """Any values as rows of the message, [ceil(n / H), H], zeros at the end."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width)
