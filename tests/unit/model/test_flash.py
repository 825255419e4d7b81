"""Attention through flash-attn's interface equals PyTorch's, without padding, where no mask is needed.

flash-attn runs on GPUs only. The tests cover our use of it: layouts, sequence boundaries, which calls it receives. Its
two functions are replaced by plain ones with the same signatures and the same alignment of the causal mask.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from models import RECURSIONS, SEQ, random_ids, small_config, training_batch
from torch import Tensor

from mor_megatron.model import build_model, layer_spec
from mor_megatron.model.attention import AttentionMetadata, AttentionPattern, CoreAttention, RotaryTable
from mor_megatron.model.flash import FlashAttention
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, select_mask

TOL = 2e-6  # fp32 through eight layers, softmax in another order

MASKED = {
    "recursive_sharing",
    "sequence_sharing",
    "expert_sharing",
    "expert_sharing_update",
    "token_sharing",
    "token_sharing_update",
}
"""Their recursions attend to keys of all tokens; only some of them with fewer queries than keys."""


class PlainFlash(ModuleType):
    """flash_attn 2.8's two functions, sequence by sequence, and what they were called with."""

    def __init__(self):
        super().__init__("flash_attn")
        self.regular_calls: list[tuple[int, ...]] = []
        self.varlen_calls: list[list[int]] = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False) -> Tensor:
        """q [B, Q, N, D], k and v [B, K, G, D] -> [B, Q, N, D]."""
        assert q.shape[0] == k.shape[0] == v.shape[0]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        self.regular_calls.append(tuple(q.shape))
        return torch.stack([_attend(*parts, softmax_scale, causal) for parts in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False,
    ) -> Tensor:  # fmt: skip
        """q [T, N, D], k and v [T', G, D], boundaries [B + 1] int32 -> [T, N, D]."""
        parts = []
        for x, boundaries, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert boundaries.dtype == torch.int32
            assert isinstance(longest, int)
            assert boundaries[0] == 0
            assert boundaries[-1] == len(x)
            assert boundaries.diff().max() == longest
            parts.append(boundaries.tolist())
        self.varlen_calls.append(parts[0])
        out = []
        for b in range(len(parts[0]) - 1):
            of_q, of_k = (slice(bounds[b], bounds[b + 1]) for bounds in parts)
            out.append(_attend(q[of_q], k[of_k], v[of_k], softmax_scale, causal))
        return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """One sequence, [Q, N, D] and [K, G, D] -> [Q, N, D]; the causal mask is aligned to the bottom right corner."""
    queries, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * (width**-0.5 if scale is None else scale)
    if causal:
        seen = torch.arange(len(k)) <= torch.arange(queries).unsqueeze(1) + len(k) - queries
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


@pytest.fixture
def flash(monkeypatch) -> PlainFlash:
    module = PlainFlash()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def _run(config, documents: bool = False) -> dict[str, Tensor]:
    """Losses and every gradient."""
    model = build_model(config)
    batch = training_batch(random_ids())
    if documents:
        batch = replace(batch, document_ids=(torch.arange(SEQ) >= SEQ // 3).long().expand(3, SEQ))
    losses = model(batch, RoutingContext())
    losses.mean().backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters()}


def _with_flash(config, monkeypatch, **options) -> dict[str, Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(layer_spec, "uses_flash_attention", lambda config: True)
        return _run(config, **options)


def _largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("name", RECURSIONS)
def test_equals_pytorch(process_group, monkeypatch, flash, name):
    config = small_config(name)
    assert _largest_difference(_with_flash(config, monkeypatch), _run(config)) < TOL
    layers = config.model.num_layers
    calls = len(flash.regular_calls) + len(flash.varlen_calls)
    if name in MASKED:
        assert 0 < calls <= layers
    else:
        assert calls == layers, "a layer went another way"
    if name == "token":
        assert any(len(set(torch.tensor(b).diff().tolist())) > 1 for b in flash.varlen_calls), "no ragged lengths"


def test_grouped_queries(process_group, monkeypatch, flash):
    config = small_config("token", group_query_attention=True, num_query_groups=2)
    assert _largest_difference(_with_flash(config, monkeypatch), _run(config)) < TOL
    assert flash.varlen_calls


def test_documents_kept_apart_stay_on_pytorch(process_group, monkeypatch, flash):
    config = small_config("expert")
    got, expected = _with_flash(config, monkeypatch, documents=True), _run(config, documents=True)
    assert _largest_difference(got, expected) == 0.0
    assert not flash.regular_calls
    assert _largest_difference(got, _run(config)) > 1e-4, "documents made no difference"


def test_a_sequence_without_active_tokens(process_group, flash):
    torch.manual_seed(0)
    mask = torch.rand(SEQ, 3) < 0.4
    mask[:, 1] = False
    active = ActiveTokens(SEQ, 3).take(select_mask(mask), ragged=True)
    assert active.packing.cu_seqlens.tolist() == [0, int(mask[:, 0].sum()), int(mask[:, 0].sum()), int(mask.sum())]
    assert active.packing.cu_seqlens.dtype == torch.int32
    pattern = AttentionPattern(
        AttentionMetadata(RotaryTable(8, SEQ, 1e4), SEQ, 3, torch.float32), active, keys_of_all=False
    )
    attention = FlashAttention(layer_spec.transformer_config(small_config("token")), 1, None, "self")
    q, k, v = (torch.randn(active.count, 1, 4, 8) for _ in range(3))
    expected = CoreAttention.forward(attention, q, k, v, pattern)
    assert (attention(q, k, v, pattern) - expected).abs().max() < TOL
