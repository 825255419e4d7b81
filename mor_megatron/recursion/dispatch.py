"""Which tokens are active, and how their rows leave the residual stream and come back.

The residual stream [S, B, H] is seen as S*B rows; token t of sequence b is row t*B + b. A set of active tokens is
either *regular* (the same number in every sequence: rows [k, B], from top-k) or *ragged* (rows [T, 1], sequence after
sequence, from a threshold or from token-choice depths). A token occurs at most once in a set, which lets gather and
scatter be plain copies in both directions.

Where the rows are on an accelerator, a size that only it knows makes the host wait. The host therefore knows how many
tokens of each sequence are active (`ActiveTokens.lengths`), and nothing here asks the device but `LocalRows.keep` where
it is not told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_megatron.recursion.host import OnHost
from mor_megatron.recursion.routing import TIE, kept


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens that a recursion processes, in causal order within each sequence.

    `rows` is None when all S*B tokens are active; otherwise [k, B] (regular) or [T, 1] (ragged) int64. Ragged ones have
    `lengths`: the number of active tokens of each sequence, known to the host.
    """

    seq_length: int
    batch_size: int
    rows: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def ragged(self) -> bool:
        """Sequences may have different numbers of active tokens."""
        return self.lengths is not None

    @property
    def settled(self) -> bool:
        """The host knows them."""
        return True

    @property
    def is_all(self) -> bool:
        """All tokens are active."""
        return self.rows is None

    @property
    def count(self) -> int:
        """Number of active tokens in the micro-batch."""
        return self.seq_length * self.batch_size if self.rows is None else self.rows.numel()

    @cached_property
    def positions(self) -> Tensor:
        """Index t of each active token, shaped like `rows`."""
        assert self.rows is not None
        return torch.div(self.rows, self.batch_size, rounding_mode="floor")

    @cached_property
    def sequences(self) -> Tensor:
        """Index b of each active token, shaped like `rows`."""
        assert self.rows is not None
        return self.rows % self.batch_size

    @property
    def shape(self) -> tuple[int, int]:
        """Leading dimensions of the rows' tensor: (S, B), (k, B) or (T, 1)."""
        return (self.seq_length, self.batch_size) if self.rows is None else tuple(self.rows.shape)

    def mask(self) -> Tensor:
        """True at the active tokens, [S, B] bool (on the CPU when all are active)."""
        if self.rows is None:
            return torch.ones(self.seq_length, self.batch_size, dtype=torch.bool)
        mask = torch.zeros(self.seq_length * self.batch_size, dtype=torch.bool, device=self.rows.device)
        return mask.index_fill_(0, self.rows.view(-1), True).view(self.seq_length, self.batch_size)

    def take(self, local: Tensor, lengths: tuple[int, ...] | None = None) -> ActiveTokens:
        """The subset at `local` rows of this set: flat indexes into its rows, [k, B] (regular), or [T, 1] (ragged) with
        the number of them in each sequence."""
        rows = local if self.rows is None else self.rows.view(-1)[local]
        return ActiveTokens(self.seq_length, self.batch_size, rows, lengths)


class GatherRows(torch.autograd.Function):
    """Rows [n, ...] = source[index]; each source row is taken at most once, so backward is a copy, not an addition."""

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = source.shape[0]
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _place(grad, index, ctx.num_rows), None


class ScatterRows(torch.autograd.Function):
    """A zero tensor of `num_rows` rows with source written at `index` (each index at most once)."""

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _place(source, index, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class AddRows(torch.autograd.Function):
    """base with gate * update added at `index` (each index at most once): the combination step of MoR.

    base [n, H], update [m, H], gate [m, 1] or None (gate 1), index [m] or None (all rows).
    """

    @staticmethod
    def forward(ctx, base: Tensor, update: Tensor, gate: Tensor | None, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(update if gate is not None else None, gate, index)
        if index is None:
            return base + update if gate is None else torch.addcmul(base, update, gate)
        out = base.clone()
        chosen = base.index_select(0, index)
        out[index] = chosen.add_(update) if gate is None else chosen.addcmul_(update, gate)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        update, gate, index = ctx.saved_tensors
        rows = grad if index is None else grad.index_select(0, index)
        if gate is None:
            return grad, rows, None, None
        grad_gate = (rows * update).sum(-1, keepdim=True)
        return grad, rows * gate if index is None else rows.mul_(gate), grad_gate, None


def _place(source: Tensor, index: Tensor, num_rows: int) -> Tensor:
    out = source.new_zeros(num_rows, *source.shape[1:])
    out[index] = source
    return out


def gather(hidden: Tensor, active: ActiveTokens) -> Tensor:
    """Rows of the active tokens.

    Args:
        hidden: residual stream, [S, B, H].
        active: the tokens to take.
    Returns:
        [k, B, H] (regular), [T, 1, H] (ragged) or `hidden` itself (all tokens).
    """
    if active.rows is None:
        return hidden
    rows = GatherRows.apply(hidden.reshape(-1, hidden.shape[-1]), active.rows.reshape(-1))
    return rows.view(*active.rows.shape, hidden.shape[-1])


RowAddition = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""What `AddRows` computes, by whatever is fastest where the rows are."""


def combine(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None,
    active: ActiveTokens,
    add_rows: RowAddition = AddRows.apply,
) -> Tensor:
    """h[t] + g_t * y_t at the active tokens, h[t] elsewhere (MoR paper, eq. of expert-choice; docs/mor.md, sec. 3.1).

    Args:
        hidden: residual stream, [S, B, H].
        update: output of the block, shaped like `gather(hidden, active)`.
        gate: [k, B, 1] or [T, 1, 1]; None for additive gating.
        active: where the rows belong.
        add_rows: computes it.
    """
    width = hidden.shape[-1]
    gate = None if gate is None else gate.reshape(-1, 1).to(hidden.dtype)
    index = None if active.rows is None else active.rows.reshape(-1)
    return add_rows(hidden.reshape(-1, width), update.reshape(-1, width), gate, index).view_as(hidden)


def take_rows(x: Tensor, local: Tensor | None) -> Tensor:
    """Rows of a compact tensor [k, B, W] at flat indexes `local` [k', B] or [T, 1]; all of them for None."""
    if local is None:
        return x
    return GatherRows.apply(x.reshape(-1, x.shape[-1]), local.reshape(-1)).view(*local.shape, x.shape[-1])


class LocalRows:
    """The `Layout` of training with all rows on this rank; `distributed.row_exchange` has that of sequence parallelism.

    Collected values are [S, B, W], [k, B, W] or [T, 1, W]; an index is flat, [k, B] or [T, 1].

    Args:
        device: where the rows are.
        add_rows: how rows come back there.
    """

    def __init__(self, device: torch.device | str = "cpu", add_rows: RowAddition = AddRows.apply):
        self.device = torch.device(device)
        self.add_rows = add_rows

    def gather(self, hidden: Tensor, active: ActiveTokens) -> Tensor:
        """Rows of the active tokens out of the residual stream; see `gather`."""
        return gather(hidden, active)

    def combine(self, hidden: Tensor, rows: Tensor, gate: Tensor | None, active: ActiveTokens) -> Tensor:
        """Rows back into the residual stream; see `combine`. The gate is that of all active tokens."""
        return combine(hidden, rows, gate, active, self.add_rows)

    def take(self, rows: Tensor, active: ActiveTokens, index: Tensor | None) -> Tensor:
        """The rows at `index` among `rows`, which are those of `active`; see `take_rows`."""
        return take_rows(rows, index)

    def collect(self, values: Tensor, active: ActiveTokens) -> Tensor:
        """Values of all tokens of `active`: those given, since all rows are on this rank."""
        return values

    def at(self, values: Tensor, index: Tensor | None) -> Tensor:
        """Collected values at `index`."""
        return take_rows(values, index)

    def of(self, values: Tensor, active: ActiveTokens) -> Tensor:
        """Of values [S, B], those of the active tokens."""
        return values if active.rows is None else values.view(-1)[active.rows]

    def counts(self, values: Tensor, active: ActiveTokens, bins: int) -> Tensor:
        """Small whole numbers, one for each active token -> how many of each sequence have each value, [B, bins]."""
        chosen = F.one_hot(values, bins)  # [.., bins]
        if not active.ragged:
            return chosen.sum(0)
        totals = chosen.new_zeros(active.batch_size, bins)
        return totals.index_add_(0, active.sequences.view(-1), chosen.view(-1, bins))

    def to_host(self, values: Tensor, active: ActiveTokens) -> OnHost:
        """Values that the host will read."""
        return OnHost(values)

    def keep(
        self, active: ActiveTokens, mask: Tensor, lengths: tuple[int, ...] | None = None, regular: bool = False
    ) -> tuple[ActiveTokens, Tensor]:
        """The subset where `mask` is true, ragged or regular. Without `lengths`, the host waits for them."""
        if lengths is None:
            lengths = tuple(self.counts(mask.long(), active, 2)[:, 1].tolist())
        index = select_mask(mask, sum(lengths))
        if regular:
            index = index.view(active.batch_size, -1).transpose(0, 1).contiguous()
        return active.take(index, None if regular else lengths), index

    def best(self, active: ActiveTokens, scores: Tensor, capacity: float) -> tuple[ActiveTokens, Tensor | None]:
        """The k highest of the scores [k_prev, B] of each sequence, k = capacity * S; see `select_topk`."""
        k = kept(capacity, active.seq_length)
        if k == scores.shape[0]:
            return active, None
        index = select_topk(scores, k)
        return active.take(index), index

    def none(self, active: ActiveTokens) -> ActiveTokens:
        """The empty set."""
        empty = torch.empty(0, 1, dtype=torch.int64, device=self.device)
        return active.take(empty, (0,) * active.batch_size)

    def mask(self, active: ActiveTokens) -> Tensor:
        """True at the active tokens, [S, B]."""
        return active.mask()

    def means(self, values: Tensor, active: ActiveTokens, per_sequence: bool) -> Tensor:
        """Mean of [S, B, W] over tokens: [B, W], or [W]."""
        return values.mean((0,) if per_sequence else (0, 1))


def select_topk(scores: Tensor, k: int) -> Tensor:
    """The k highest scores of each sequence, in causal order; among equal ones at the cut, the earlier tokens.

    `TIE` defines which scores count as equal to the k-th highest.

    Args:
        scores: router logits of the candidates, [k_prev, B], fp32 (bf16 logits tie at the cut; docs/mor.md, sec. 3.1).
        k: tokens to keep per sequence, 1 <= k <= k_prev.
    Returns:
        Flat indexes i*B + b of the kept candidates, [k, B] int64, ascending in each column.
    Raises:
        ValueError: k exceeds the number of candidates.
    """
    if k > scores.shape[0]:
        raise ValueError(f"cannot select k={k} of {scores.shape[0]} candidates: capacities must not increase")
    scores = scores.nan_to_num()  # k tokens are kept even in a step that will be skipped
    cut = scores.topk(k, dim=0, sorted=False).values.amin(0)  # [B]
    band = TIE * (1.0 + scores.abs().mean(0))
    above = scores > cut + band
    tied = (scores >= cut - band) & ~above
    keep = above | (tied & (_running_count(tied) <= k - above.sum(0)))
    slot = torch.where(keep, _running_count(keep) - 1, k)  # slot k takes what is not kept
    index = torch.arange(scores.numel(), device=scores.device).view_as(scores)
    return index.new_empty(k + 1, scores.shape[1]).scatter_(0, slot, index)[:k]


def _running_count(mask: Tensor) -> Tensor:
    """Of true values in each column, [k, B]. Along the last dim, for which a GPU has a scan that occupies it."""
    return mask.transpose(0, 1).cumsum(1).transpose(0, 1)


def select_mask(mask: Tensor, count: int) -> Tensor:
    """Flat indexes i*B + b at which `mask` [k, B] is true, `count` of them, sequence after sequence, [T, 1] int64."""
    column, row = torch.nonzero_static(mask.transpose(0, 1), size=count).unbind(1)
    return (row * mask.shape[1] + column).view(-1, 1)
