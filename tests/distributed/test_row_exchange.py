"""Rows sharded by sequence over ranks move like rows on one rank, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mor_megatron.distributed.row_exchange import ShardedRows
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows, select_topk

SEQ, BATCH, WIDTH = 24, 3, 5
KEPT = [(15, 7), (1, 1), (24, 2), (17, 16)]
"""Tokens of two nested selections; most are not divisible by two or four ranks."""


def _share(x: torch.Tensor, rows: ShardedRows) -> torch.Tensor:
    """This rank's equal share of rows, zeros at the end."""
    each = -(-x.shape[0] // rows.size)
    padded = torch.cat([x, x.new_zeros(each * rows.size - x.shape[0], *x.shape[1:])])
    return padded[rows.rank * each : (rows.rank + 1) * each]


def _selections(kept: tuple[int, int], ragged: bool) -> tuple[ActiveTokens, torch.Tensor, ActiveTokens]:
    """A set of tokens, an index into it, and the subset there; the same on every rank."""
    generator = torch.Generator().manual_seed(sum(kept))
    everything = ActiveTokens(SEQ, BATCH)
    scores = torch.rand(SEQ, BATCH, generator=generator)
    if ragged:
        outer, _ = LocalRows().keep(everything, scores < kept[0] / SEQ)
        inner, local = LocalRows().keep(outer, torch.rand(outer.shape, generator=generator) < 0.5)
        return outer, local, inner
    outer = everything.take(select_topk(scores, kept[0]))
    local = select_topk(torch.rand(outer.shape, generator=generator), kept[1])
    return outer, local, outer.take(local)


def moves(kept: tuple[int, int], ragged: bool) -> list[float]:
    """Largest differences from `LocalRows`: rows of each move, and gradients of hidden state, update and gate."""
    rows, local_rows = ShardedRows(dist.group.WORLD), LocalRows()
    outer, local, inner = _selections(kept, ragged)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQ, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    gate = torch.rand(*inner.shape, 1, generator=generator, dtype=torch.float64)
    weight = torch.randn(SEQ, BATCH, WIDTH, generator=generator, dtype=torch.float64)

    def run(rows, hidden, gate, weight):
        hidden.requires_grad_()
        gate.requires_grad_()
        x = rows.gather(hidden, outer)
        y = rows.take(x, outer, local)
        out = rows.combine(hidden, y.sin(), gate, inner)
        (out * weight).sum().backward()
        return x, y, out

    expected = run(local_rows, hidden, gate, weight)
    mine_hidden, mine_gate = _share(hidden.detach(), rows), gate.detach().clone()
    got = run(rows, mine_hidden, mine_gate, _share(weight, rows))
    pairs = [(a, _share(b.detach(), rows)) for a, b in zip(got, expected, strict=True)]
    pairs += [(mine_hidden.grad, _share(hidden.grad, rows)), (mine_gate.grad, gate.grad)]
    pairs.append((rows.collect(got[1].detach(), inner), expected[1]))
    return [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in pairs]


@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_moves_equal_those_of_one_process(workers, ranks, kept, ragged):
    # combine() takes the group for a tensor-parallel one
    for differences in workers.run(ranks, (ranks, 1), moves_in_a_layout, ranks, kept, ragged):
        assert max(differences) < 1e-14, differences  # copies and one product in fp64


def moves_in_a_layout(ranks: int, kept: tuple[int, int], ragged: bool) -> list[float]:
    from table import Layout, build_config

    from mor_megatron.distributed.initialize import initialize_distributed

    initialize_distributed(build_config("vanilla", Layout("tp", tp=ranks)))
    return moves(kept, ragged)
