"""Attention of a MoR model: which keys the rows of a pass see, and the layer that looks at them.

This file travels with an exported model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mor_megatron.recursion.host import on_device
from mor_megatron.recursion.plan import VirtualLayer

from .cache_mor import MoRCache
from .configuration_mor import MoRConfig
from .relaxed_mor import Recursions, Relaxed
from .rows_mor import Rows

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class Visibility:
    """What the rows of one pass see. Made once, used by every layer of the pass.

    Args:
        rows: the tokens of the pass.
        all_rows: all tokens of this call.
        recursion: of the pass; None for the layers that run once.
        reads: keys and values are those of recursion 0; with kv_mode sharing_update, the rows' own stand in their
            places among these.
        config: of the model.
        cache: earlier tokens, and where new ones are stored; or none.
        rotation: cos and sin at the rows' positions (`rotation_of`).
    """

    def __init__(
        self,
        rows: Rows,
        all_rows: Rows,
        recursion: int | None,
        reads: bool,
        config: MoRConfig,
        cache: MoRCache | None,
        rotation: Pair,
    ):
        self.rows, self.all_rows, self.recursion, self.reads, self.cache = rows, all_rows, recursion, reads, cache
        self.past = cache is not None and not cache.is_empty
        self.updates = reads and config.kv_mode == "sharing_update"
        self.projects = not reads or self.updates
        """Whether keys and values of the rows themselves are needed."""
        self.rotation, self.config = rotation, config
        self._before = self._own_lengths()
        self.places = None
        if cache is not None and self.projects:
            self.places = cache.append(recursion, rows)

    @property
    def device(self) -> torch.device:
        return self.rows.sequence.device

    @cached_property
    def window(self):
        """Stored rows that are seen: those of this recursion, or of recursion 0."""
        # flash-attn has no plans, and knows no masks.
        whole = self.device.type != "cpu" and not self.config._attn_implementation.startswith("flash")
        return self.cache.window(0 if self.reads else self.recursion, self.rows.present, self.device, whole)

    @cached_property
    def is_single(self) -> bool:
        """Whether there is one new row a sequence, which sees all that is stored of its sequence."""
        new = self.all_rows.lengths if self.reads else self.rows.lengths
        return self.past and self.rows.longest == 1 and all(new[b] == 1 for b in self.rows.present)

    @cached_property
    def in_turn(self) -> bool:
        """Whether sequences are attended to one after the other, each in place: a single row each, ragged keys, and no
        accelerator, where every call would be a launch. Side by side, all that is stored would first be copied."""
        return self.is_single and not self.updates and not self.window.is_even and self.device.type == "cpu"

    @cached_property
    def mask(self) -> Tensor | None:
        """[present, 1, Q, K], true where a key is seen; None: plain causal attention, or one query that sees all."""
        if not self.past:
            if not self.reads or self.rows is self.all_rows:
                return None
            shown = max(self.all_rows.lengths[b] for b in self.rows.present)
        else:
            shown, lengths = self.window.shown, self.window.lengths
            if self.is_single and (self.in_turn or set(lengths) == {shown}):
                return None
        if self.reads:
            visible = self.rows.position + 1
        else:
            visible = on_device(self._before, self.device)[self.rows.sequence] + self.rows.offset + 1
        visible = self.rows.pad(visible, fill=1)
        return (torch.arange(shown, device=self.device) < visible.unsqueeze(2)).unsqueeze(1)

    @cached_property
    def function(self) -> Callable:
        """The attention function of transformers."""
        name = self.config._attn_implementation
        if self.mask is not None and name.startswith("flash"):
            name = "sdpa"  # flash-attn knows no masks; it serves where attention is plainly causal
        return ALL_ATTENTION_FUNCTIONS.get(name, eager_attention)

    def exchange(self, slot: int, own: Pair | None, source: Pair | None, source_slot: int) -> list[Pair]:
        """Store what is new, and give what is seen.

        Args:
            slot: position in the network.
            own: keys and values of the rows, [T, G, D], if `projects`.
            source: those of all tokens of this call at `source_slot`, if `reads`.
        Returns:
            Keys and values, [present, G, K, D]; or [1, G, K, D] for each sequence, if `in_turn`.
        """
        if self.places is not None:
            self.cache.write(slot, self.places, *own)
        if self.in_turn:
            keys, values = (self.window.each(buffer) for buffer in self.cache.buffers(source_slot))
            return list(zip(keys, values, strict=True))
        if self.past:
            seen = tuple(self.window.read(buffer) for buffer in self.cache.buffers(source_slot))
        elif self.reads:
            seen = tuple(self._of_present(x) for x in source)
        else:
            return [tuple(self.rows.pad(x).transpose(1, 2) for x in own)]
        return [self._updated(seen, slot, own) if self.updates else seen]

    def _own_lengths(self) -> tuple[int, ...]:
        """Rows of this recursion that are stored already."""
        if not self.past or not self.projects:
            return ()
        return self.cache.counts().get(self.recursion, (0,) * len(self.rows.lengths))

    def _of_present(self, packed: Tensor) -> Tensor:
        padded = self.all_rows.pad(packed).transpose(1, 2)
        if len(self.rows.present) == len(self.all_rows.present):
            return padded
        columns = [self.all_rows.present.index(b) for b in self.rows.present]
        return padded[on_device(columns, self.device), :, : max(self.all_rows.lengths[b] for b in self.rows.present)]

    def _updated(self, seen: Pair, slot: int, own: Pair) -> Pair:
        """sharing_update: a copy in which the active rows are replaced; nothing is written back."""
        column, position = self.rows.column, self.rows.position
        if self.past:
            source, *old = self.cache.replaced(self.recursion, self.rows.present, self._before, self.device)
            column, position = torch.cat([old[0], column]), torch.cat([old[1], position])
            own = tuple(torch.cat([b[source], new]) for b, new in zip(self.cache.buffers(slot), own, strict=True))
        heads, width = seen[0].shape[1:3]
        target = ((column * heads).unsqueeze(1) + torch.arange(heads, device=self.device)) * width
        target = (target + position.unsqueeze(1)).flatten()
        return tuple(
            full.reshape(-1, full.shape[-1]).index_copy(0, target, new.flatten(0, 1)).view(full.shape)
            for full, new in zip(seen, own, strict=True)
        )


class MoRAttention(Relaxed):
    """Self-attention of packed rows, through the attention functions of transformers."""

    is_causal = True

    def __init__(self, config: MoRConfig, recursions: Mapping[str, range]):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        width, groups = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, groups, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, groups, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)
        self.add_adapters(config, recursions, "q", "k", "v")
        self.add_adapters(config, recursions, "o")

    def forward(
        self, hidden: Tensor, visibility: Visibility, use: VirtualLayer, source: Pair | None
    ) -> tuple[Tensor, Pair | None]:
        """[T, H] -> [T, H], and the rows' own keys and values [T, G, D] if there are any."""
        rows, r = visibility.rows, use.recursion
        query, *own = self.heads(hidden, r, *("qkv" if visibility.projects else "q"))
        query = rotate(query, visibility.rotation)
        own = (rotate(own[0], visibility.rotation), own[1]) if own else None
        seen = visibility.exchange(use.index, own, source, use.kv_source if visibility.reads else use.index)
        queries = rows.pad(query).transpose(1, 2).chunk(len(seen))
        attend, options = visibility.function, {"dropout": 0.0, "scaling": self.scaling}
        parts = [attend(self, q, *pair, visibility.mask, **options)[0] for q, pair in zip(queries, seen, strict=True)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.project(rows.unpad(out.flatten(2)), r, "o")[0], own

    def heads(self, hidden: Tensor, recursion: Recursions, *parts: str) -> list[Tensor]:
        """Queries, keys, values: q, k, v; [T, H] -> [T, heads, D], not rotated."""
        return [x.view(len(hidden), -1, self.head_dim) for x in self.project(hidden, recursion, *parts)]


def rotation_of(positions: Tensor, config: MoRConfig, dtype: torch.dtype) -> Pair:
    """cos and sin of RoPE of positions [T], computed in fp32, [T, 1, D]; the first half of sin is negative."""
    settings = (config.head_dim, config.rope_theta, config.rope_scaling_factor)
    angles = torch.outer(positions.float(), inverse_frequencies(*settings, positions.device))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], 1).unsqueeze(1), torch.cat([-sin, sin], 1).unsqueeze(1)


@lru_cache
def inverse_frequencies(head_dim: int, theta: float, scaling: float | None, device: torch.device) -> Tensor:
    """[D/2] fp32. Kept: it takes longer to make than to use."""
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is None:
            return frequencies
        # Llama 3's: what turns less than once in 8192 positions is slowed down, what turns four times stays as it is.
        stays = ((8192 / (2 * math.pi / frequencies) - 1.0) / 3.0).clamp(0.0, 1.0)
        return (1.0 - stays) * frequencies / scaling + stays * frequencies


def rotate(x: Tensor, rotation: Pair) -> Tensor:
    """RoPE in the rotate-half layout; x [T, N, D]."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v written out; softmax in fp32. Gives [n, Q, N, D] and the weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


__all__ = ["MoRAttention", "Visibility", "rotation_of"]
