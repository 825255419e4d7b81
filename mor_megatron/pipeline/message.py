"""What travels between two ranks of the pipeline: one tensor [R, H] for each turn of a micro-batch.

| part      | rows         | when                                                                                    |
|-----------|--------------|-----------------------------------------------------------------------------------------|
| working   | k_r * B      | always; all S * B without routing                                                       |
| selection | S * B / H    | on the way out: the mask of chosen tokens (expert_choice), the depths once (token_choice) |
| stream    | S * B        | in the last turn only: its last rank closes the recursion                               |
| gate      | k_r * B / H  | with the stream                                                                         |

Before the last turn the first rank keeps stream and gate: it opens each recursion, and closes it when the rows have
come round. Masks and depths are small whole numbers, exact in bf16. Under sequence parallelism, working rows and stream
are shares.

Every rank knows beforehand how many rows will come: from the capacity, or from the depths that came in turn 0. Only the
threshold of evaluation leaves it open; then the working rows are filled up to S * B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.model.mor_model import MoRModel
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, select_mask
from mor_megatron.recursion.expert_choice import kept_tokens
from mor_megatron.recursion.stream import Stream


@dataclass
class MessageFormat:
    """The messages of one micro-batch, as one rank sees them."""

    model: MoRModel
    context: RoutingContext
    everything: ActiveTokens
    depth: Tensor | None = None
    """token_choice: depth of each token, [S, B], once it is known here."""

    def __post_init__(self):
        self.shares = (
            parallel_state.get_tensor_model_parallel_world_size() if self.model.config.sequence_parallel else 1
        )
        self.routing = self.model.run_config.recursion.routing
        self.num_turns = self.model.pipeline.num_chunks

    def num_rows(self, turn: int, to_first: bool) -> int:
        """R of a message: of a turn, from the last rank back `to_first`, or from any other to the next."""
        return max(1, sum(self._parts(turn, to_first).values()))

    def pack(self, stream: Stream, turn: int, to_first: bool) -> Tensor:
        """[R, H] of an open recursion whose rows have passed this rank's layers."""
        width = stream.rows.shape[-1]
        filled = []
        for name, size in self._parts(turn, to_first).items():
            if name == "working":
                part = stream.rows.reshape(-1, width)
            elif name == "selection":
                part = stream.depth if self.routing == "token_choice" else stream.active.mask()
                part = _as_rows(part.to(stream.rows), width)
            elif name == "stream":
                part = stream.hidden.reshape(-1, width)
            else:
                part = _as_rows(stream.gate.to(stream.rows.dtype), width)
            filled.append(F.pad(part, (0, 0, 0, size - part.shape[0])) if part.shape[0] < size else part)
        message = torch.cat(filled)
        return message if message.shape[0] > 0 else F.pad(message, (0, 0, 0, 1))

    def unpack(self, message: Tensor, turn: int) -> Stream:
        """The open recursion out of a message that did not come back to the first rank."""
        sizes = self._parts(turn, to_first=False)
        parts = dict(zip(sizes, message[: sum(sizes.values())].split(list(sizes.values())), strict=True))
        active = self._active(turn, parts.get("selection"))
        hidden = gate = None
        if "stream" in parts:
            hidden = parts["stream"].view(-1, self.everything.batch_size, message.shape[-1])
        if "gate" in parts:
            gate = parts["gate"].reshape(-1)[: active.count].view(*active.shape, 1)
        return Stream(active, hidden, self.unpack_rows(message, active), gate, self.depth)

    def unpack_rows(self, message: Tensor, active: ActiveTokens) -> Tensor:
        """Its working rows, [k, B, H] or [T, 1, H] or this rank's share of them."""
        rows, columns = active.shape
        rows = -(-rows // self.shares)
        return message[: rows * columns].view(rows, columns, message.shape[-1])

    def _parts(self, turn: int, to_first: bool) -> dict[str, int]:
        """Rows of each part, in their order."""
        width = self.model.config.hidden_size
        tokens, columns = self.everything.seq_length, self.everything.batch_size
        rows, row_columns = self._largest(turn)
        sizes = {"working": -(-rows // self.shares) * row_columns}
        if to_first or self.routing == "none":
            return sizes
        if self.routing == "token_choice":
            selects = turn == 0
        else:
            selects = self.context.fixed_depth is None and (rows, row_columns) != (tokens, columns)
        if selects:
            sizes["selection"] = -(-tokens * columns // width)
        if turn == self.num_turns - 1:
            sizes["stream"] = tokens // self.shares * columns
            if self.model.run_config.recursion.router_gating == "weighted" and rows > 0:
                sizes["gate"] = -(-rows * row_columns // width)
        return sizes

    def _largest(self, turn: int) -> tuple[int, int]:
        """Shape of the active set of a turn; an upper bound where only the message itself will tell."""
        tokens, columns = everything = self.everything.shape
        if self.routing == "none" or (self.routing == "token_choice" and turn == 0):
            return everything
        if self.routing == "token_choice":
            return int((self.depth >= turn).sum()), 1
        if self.context.fixed_depth is not None:
            return everything if turn < self.context.fixed_depth else (0, 1)
        if self.context.selection == "threshold":
            return everything if self.model.plan.capacities[turn] == 1.0 else (tokens * columns, 1)
        recursion, plan = self.model.run_config.recursion, self.model.plan
        return kept_tokens(recursion, plan, turn, tokens, self.context, self.model.training), columns

    def _active(self, turn: int, selection: Tensor | None) -> ActiveTokens:
        tokens, columns = self.everything.shape
        if selection is not None:
            selection = selection.detach().reshape(-1)[: tokens * columns].view(tokens, columns)
        if self.routing == "token_choice":
            if turn == 0:
                self.depth = selection.round().long()
                return self.everything
            return self.everything.take(select_mask(self.depth >= turn), ragged=True)
        if selection is None:
            return self.everything if self._largest(turn)[0] > 0 else self.everything.none(self.model.rotary.cos.device)
        rows = select_mask(selection > 0.5)
        if self.context.selection == "threshold":
            return self.everything.take(rows, ragged=True)
        return self.everything.take(rows.view(columns, -1).transpose(0, 1).contiguous())


def _as_rows(values: Tensor, width: int) -> Tensor:
    """Any values as rows of the message, [ceil(n / H), H], zeros at the end."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width)
