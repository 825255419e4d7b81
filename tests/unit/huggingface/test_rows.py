"""Packed rows of an export are selected as the rows of training are."""

from __future__ import annotations

import pytest
import torch

from mor_megatron.huggingface.rows_mor import PackedRows, Rows
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows

S, B = 40, 3


@pytest.mark.parametrize("noise", [-1e-7, 0.0, 1e-7], ids=str)
def test_many_equal_scores_are_decided_by_position(noise):
    """Also where the rounding of a device made later tokens larger or smaller, and in a selection among selected."""
    scores = torch.randint(0, 3, (S, B), generator=torch.Generator().manual_seed(0)).float()
    scores += noise * torch.arange(float(S)).unsqueeze(1)
    best = [sorted(sorted(range(S), key=lambda t: (-scores[t, b].round(), t))[:20]) for b in range(B)]
    again = [sorted(sorted(kept, key=lambda t: (-scores[t, b].round(), t))[:7]) for b, kept in enumerate(best)]
    local, packed = LocalRows(), PackedRows()
    regular, _ = local.best(ActiveTokens(S, B), scores, 20 / S)
    assert regular.positions.T.tolist() == best
    assert local.best(regular, scores.view(-1)[regular.rows], 7.5 / S)[0].positions.T.tolist() == again
    everything = Rows.of(torch.arange(B).repeat_interleave(S), (0,) * B, (S,) * B)
    rows, _ = packed.best(everything, scores.T.flatten(), 20 / S)
    assert rows.position.view(B, -1).tolist() == best
    rows, _ = packed.best(rows, rows.take(scores.T.flatten()), 7.5 / S)
    assert rows.position.view(B, -1).tolist() == again


def test_a_short_sequence_keeps_its_share():
    """The capacity is a fraction of each sequence's rows in the call, even of those that have already left."""
    lengths = (1, 6, 3)
    rows = Rows.of(torch.arange(3).repeat_interleave(torch.tensor(lengths)), (0,) * 3, lengths)
    kept, _ = PackedRows().keep(rows, torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0]).bool())
    assert kept.lengths == (1, 1, 2)
    best, index = PackedRows().best(kept, torch.tensor([0.0, 1.0, 2.0, 3.0]), 0.5)
    assert best.lengths == (1, 1, 1)
    assert index.tolist() == [0, 1, 3]
