"""Self-attention over the active tokens, and where its keys and values come from.

Megatron-core's SelfAttention owns the weights (tensor parallel linears, initialisation, checkpoint names); the forward
here is ours because a recursion may attend with compact rows, at scattered positions, to the keys of recursion 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import (
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from mor_megatron.model.elementwise import implementation
from mor_megatron.model.frame import Frame
from mor_megatron.model.functional import PrefixesFunction
from mor_megatron.model.recompute import recompute
from mor_megatron.recursion.dispatch import ActiveTokens

QUERY_BLOCK = 128
"""Compact queries attended at once in masked attention; smaller skips more keys, larger costs fewer calls."""


KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of all tokens at one virtual layer, each [S, B, G, D]."""


class RotaryTable(nn.Module):
    """cos and sin of RoPE for every position, fp32, [max_positions, D/2].

    Args:
        scaling: Llama 3's factor of the slow frequencies; None leaves them.
    """

    def __init__(self, head_dim: int, max_positions: int, base: float, scaling: float | None = None):
        super().__init__()
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if scaling is not None:
            options = {"rope_scaling": True, "rope_scaling_factor": scaling, "use_cpu_initialization": True}
            frequencies = RotaryEmbedding(head_dim, rotary_percent=1.0, rotary_base=base, **options).inv_freq
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [.., D/2] of integer positions [..]."""
        return self.cos[positions].to(dtype), self.sin[positions].to(dtype)


@dataclass
class AttentionMetadata:
    """What attention needs of a micro-batch beside the hidden state."""

    rotary: RotaryTable
    seq_length: int
    batch_size: int
    dtype: torch.dtype
    position_ids: Tensor | None = None  # [B, S]; None: 0..S-1
    document_ids: Tensor | None = None  # [B, S]; None: one document
    store: dict[int, KeyValue] = field(default_factory=dict)
    """What later recursions attend to, by the index of the virtual layer that computed it."""

    @property
    def all_tokens(self) -> ActiveTokens:
        """All tokens."""
        return ActiveTokens(self.seq_length, self.batch_size)

    def pattern(self, active: ActiveTokens, keys_of_all: bool) -> AttentionPattern:
        """How the active tokens attend: to each other, or to the stored keys of all tokens."""
        return AttentionPattern(self, active, keys_of_all and not active.is_all)

    def rotation(self, active: ActiveTokens, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin of the active tokens' original positions, [R, C or 1, 1, D/2]."""
        if active.rows is not None:
            positions = active.positions
            if self.position_ids is not None:
                positions = self.position_ids[active.sequences, positions]
        elif self.position_ids is not None:
            positions = self.position_ids.transpose(0, 1)
        else:
            positions = torch.arange(self.seq_length, device=device).unsqueeze(1)
        cos, sin = self.rotary(positions, self.dtype)
        return cos.unsqueeze(2), sin.unsqueeze(2)


@dataclass
class AttentionPattern:
    """Rotation and visibility of one set of active tokens; shared by all layers of a pass."""

    metadata: AttentionMetadata
    active: ActiveTokens
    keys_of_all: bool
    """Keys are those of all S tokens, not of the active ones."""

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        device = self.metadata.rotary.cos.device
        return self.metadata.rotation(self.active, device)

    @property
    def masked(self) -> bool:
        """Whether plain causal attention among the rows would show them other keys."""
        return self.keys_of_all or self.metadata.document_ids is not None

    @cached_property
    def exact(self) -> Frame:
        """The rows one after the other."""
        return self._frame(exact=True)

    @cached_property
    def compact(self) -> Frame:
        """The rows one after the other, in one of few shapes."""
        return self._frame()

    @cached_property
    def spread(self) -> Frame:
        """The rows at their positions among all tokens."""
        return self._frame(spread=True)

    @cached_property
    def query_blocks(self) -> list[tuple[int, int, int]]:
        """(first query, end, keys seen) by which masked attention skips keys after a block's last position.

        With one block of a few hundred compact queries against all keys, half the products would be masked away.
        """
        rows, keys = self.exact.length, self.exact.num_keys
        if not self.keys_of_all or rows < 2 * QUERY_BLOCK:
            return [(0, rows, keys)]
        starts = list(range(0, rows, QUERY_BLOCK))
        _, last = self.exact.visible
        last = last.where(last >= 0, keys - 1)  # an empty slot: from there on, blocks see all
        last = last.amax(0).cummax(0).values  # [Q], over the micro-batch
        ends = [min(start + QUERY_BLOCK, rows) for start in starts]
        seen = last[torch.tensor(ends, device=last.device) - 1].add(1).tolist()
        return list(zip(starts, ends, seen, strict=True))

    def _frame(self, **options: bool) -> Frame:
        metadata = self.metadata
        return Frame(self.active, metadata.document_ids, self.keys_of_all, metadata.dtype, **options)


@dataclass(frozen=True)
class LayerCall:
    """One use of a physical layer, with all that differs from use to use."""

    pattern: AttentionPattern
    """Rotation of the active tokens, and what they see."""
    recursion: int | None = None
    """Which one it is; None for the unique first and last layer."""
    shared_kv: KeyValue | None = None
    """Keys and values of another virtual layer to attend to; None: the layer's own."""
    updates_shared_kv: bool = False
    """Attend to a copy of `shared_kv` in which the active rows are the layer's own (kv_mode sharing_update)."""
    stores_kv: bool = False
    """Return the layer's own keys and values, because later recursions attend to them."""


class PartialProduct:
    """Before a linear layer's class: a call of the module may multiply a part of its weight only.

    Through the module, so that whoever takes care of weights by their modules (ZeRO 3, offload) sees the use.
    """

    def forward(
        self, hidden: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None, **options
    ):
        """As the layer; or `product(hidden, weight, bias)`."""
        return super().forward(hidden, **options) if product is None else product(hidden, self.weight, self.bias)


class MoRSelfAttention(SelfAttention):
    """Megatron-core's SelfAttention with compact rows and shared keys (MoR paper, sec. 2.2.2; docs/mor.md, sec. 5).

    Under sequence parallelism the tensor-parallel linears gather and scatter equal shares of rows; rows that only fill
    up the last share are cut off between the two.
    """

    recompute_core_attention = False

    def forward(self, hidden: Tensor, call: LayerCall) -> tuple[Tensor, KeyValue | None]:
        """Rows [k, B, H] or [T, 1, H], or this rank's share of them -> the same shape, and what the call stores."""
        active = call.pattern.active
        rows = active.shape[0]
        cos, sin = call.pattern.rotation
        stored = None
        if call.shared_kv is not None and not call.updates_shared_kv:
            query = self.linear_qkv(hidden, call.recursion, product=self._queries)
            filled = query.shape[0]
            query = implementation(query.device.type).rotate(_first(query, rows), cos, sin)
            key, value = call.shared_kv
        else:
            mixed, _ = self.linear_qkv(hidden, call.recursion)
            filled = mixed.shape[0]
            heads = self.num_query_groups_per_partition, self._heads, self.key_hidden_size
            mixed = _first(mixed, rows).view(rows, -1, *heads)
            split_rotate = implementation(mixed.device.type).split_rotate
            query, key, value = split_rotate(mixed, cos.unsqueeze(3), sin.unsqueeze(3))
            if call.stores_kv:
                stored = key, value
            if call.shared_kv is not None:
                pairs = zip(call.shared_kv, (key, value), strict=True)
                key, value = (_replace_rows(full, own, active) for full, own in pairs)
        if self.recompute_core_attention:
            out = recompute(self.core_attention, query, key, value, call.pattern)
        else:
            out = self.core_attention(query, key, value, call.pattern)
        if filled > rows:
            out = F.pad(out, (0, 0, 0, 0, 0, filled - rows))
        out, _ = self.linear_proj(out, call.recursion)
        return out, stored

    @property
    def _heads(self) -> int:
        """Query heads of a group, its key and its value."""
        return self.num_attention_heads_per_partition // self.num_query_groups_per_partition + 2

    def _queries(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Query projection alone, [R, C, N, D]: the key and value rows of the fused weight are not multiplied."""
        groups, width = self.num_query_groups_per_partition, self.key_hidden_size
        weight = weight.view(groups, -1, width, weight.shape[-1])[:, :-2].reshape(-1, weight.shape[-1])
        bias = bias.view(groups, -1, width)[:, :-2].reshape(-1) if self.config.add_qkv_bias else None
        sequence_parallel = self.config.sequence_parallel
        trained, frozen = linear_with_grad_accumulation_and_async_allreduce, linear_with_frozen_weight
        query = (trained if weight.requires_grad else frozen)(
            hidden,
            weight,
            bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1 and not sequence_parallel,
            sequence_parallel=sequence_parallel,
            tp_group=self.pg_collection.tp,
        )
        return query.view(*query.shape[:2], -1, width)


def _first(x: Tensor, rows: int) -> Tensor:
    """The first rows. All are no slice: the gradient of one is filled with zeros and copied into."""
    return x if x.shape[0] == rows else x[:rows]


def _replace_rows(stored: Tensor, own: Tensor, active: ActiveTokens) -> Tensor:
    """A copy of stored [S, B, G, D] with the active rows replaced; nothing is written back (docs/mor.md, sec. 5)."""
    if active.rows is None:
        return own
    flat = stored.reshape(-1, *stored.shape[2:])
    return flat.index_copy(0, active.rows.view(-1), own.reshape(-1, *own.shape[2:])).view_as(stored)


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v through PyTorch's fused attention, on regular or ragged rows."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__()
        assert config.attention_dropout == 0.0, "MoR models have no dropout"
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        """query [R, C, N, D], key and value [R', C', G, D] -> [R, C, N*D]."""
        frame = pattern.exact
        query, key, value = frame.inputs(query, key, value)
        query = query.permute(1, 2, 0, 3)  # [B, N, Q, D]
        if frame.mask is None:
            out = self._attend(query, key, value, None)
        else:
            starts, ends, seen = zip(*pattern.query_blocks, strict=True)
            keys, values = (PrefixesFunction.apply(x, *seen) for x in (key, value))
            blocks = [
                self._attend(query[:, :, a:b], k, v, frame.mask[:, :, a:b, : len(k)])
                for a, b, k, v in zip(starts, ends, keys, values, strict=True)
            ]
            out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        return frame.take(out.permute(2, 0, 1, 3).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [B, N, Q, D], key and value [K, B, G, D], mask [B, 1, Q, K] -> [B, N, Q, D]."""
        return F.scaled_dot_product_attention(
            query,
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[1],
        )
