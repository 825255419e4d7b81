"""Selecting, gathering and combining rows equals plain indexing."""

from __future__ import annotations

import math

import pytest
import torch

from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows, combine, gather, select_topk, take_rows

S, B, H = 7, 3, 4


@pytest.fixture
def hidden():
    return torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_topk_is_causal_order_and_best():
    scores = torch.randn(S, B, generator=torch.Generator().manual_seed(1))
    local = select_topk(scores, 4)
    for b in range(B):
        kept = local[:, b] // B
        assert (local[:, b] % B == b).all()
        assert torch.equal(kept, kept.sort().values)
        assert set(kept.tolist()) == set(scores[:, b].topk(4).indices.tolist())


def test_topk_prefers_earlier_tokens_among_equal_ones():
    """Also where rounding made the later ones larger; and k tokens are kept whatever the scores are."""
    scores = torch.tensor([[1.0, -2.0], [1.0, 3.0], [1.0, -2.0], [5.0, -2.0], [1.0, 3.0]])
    noise = 1e-7 * torch.arange(5.0).unsqueeze(1)
    for noisy in (scores, scores + noise, scores - noise):
        assert (select_topk(noisy, 3) // 2).T.tolist() == [[0, 1, 3], [0, 1, 4]]
    for broken in (math.nan, math.inf, -math.inf):
        assert (select_topk(torch.full((5, 2), broken), 3) // 2).T.tolist() == [[0, 1, 2]] * 2


def test_topk_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="capacities must not increase"):
        select_topk(torch.zeros(3, 2), 4)


def test_nested_selection_keeps_original_rows():
    everything = ActiveTokens(S, B)
    first = everything.take(select_topk(torch.arange(S * B, dtype=torch.float32).view(S, B), 5))
    second = first.take(select_topk(-torch.arange(5 * B, dtype=torch.float32).view(5, B), 2))
    assert first.positions.tolist() == [[t] * B for t in range(2, 7)]
    assert second.positions.tolist() == [[2] * B, [3] * B]
    assert second.sequences.tolist() == [[0, 1, 2]] * 2


def test_ragged_rows_are_sequence_after_sequence(hidden):
    mask = torch.zeros(S, B, dtype=torch.bool)
    mask[1, 0] = mask[5, 0] = mask[0, 2] = True
    active, _ = LocalRows().keep(ActiveTokens(S, B), mask)
    assert active.positions.view(-1).tolist() == [1, 5, 0]
    assert active.sequences.view(-1).tolist() == [0, 0, 2]
    assert torch.equal(active.mask(), mask)
    rows = gather(hidden, active).squeeze(1)
    assert torch.equal(rows, torch.stack([hidden[1, 0], hidden[5, 0], hidden[0, 2]]))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_combine_and_its_gradient(hidden, ragged, gated):
    if ragged:
        mask = torch.rand(S, B, generator=torch.Generator().manual_seed(2)) > 0.5
        active, _ = LocalRows().keep(ActiveTokens(S, B), mask)
    else:
        active = ActiveTokens(S, B).take(select_topk(torch.rand(S, B, generator=torch.Generator().manual_seed(3)), 4))
    gate = torch.rand(*active.rows.shape, 1, dtype=torch.float64, requires_grad=True) if gated else None

    def routed(h, g):
        return combine(h, gather(h, active).square(), g, active)

    expected = hidden.detach().clone()
    for i, row in enumerate(active.rows.view(-1).tolist()):
        weight = 1.0 if gate is None else gate.detach().view(-1)[i]
        expected.view(-1, H)[row] += weight * hidden.detach().view(-1, H)[row].square()
    torch.testing.assert_close(routed(hidden, gate).detach(), expected)
    if gated:
        assert torch.autograd.gradcheck(routed, (hidden, gate))
    else:
        assert torch.autograd.gradcheck(lambda h: routed(h, None), (hidden,))


def test_take_rows_gradient(hidden):
    local = select_topk(torch.rand(S, B, generator=torch.Generator().manual_seed(4)), 3)
    assert torch.autograd.gradcheck(lambda h: take_rows(h, local), (hidden,))
    assert take_rows(hidden, None) is hidden
