"""Rules of a routing method: one that breaks them is refused, because elsewhere it would compute something else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mor_megatron.config.schema import RecursionConfig
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows
from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.plan import build_plan
from mor_megatron.recursion.routing import NoSettings, RoutingMethod, Stream, run_recursions

TOKENS = ActiveTokens(6, 2)


class Chosen(RoutingMethod):
    """Recursion r takes the tokens of a given mask [S, B]."""

    name = "chosen"

    def __init__(self, *masks, gate=None):
        super().__init__(NoSettings(), build_plan(len(masks), len(masks), "cycle"), LocalRows())
        self.masks, self.set_gate = masks, gate

    def open(self, r, stream, context):
        active, _ = self.layout.keep(stream.tokens, self.masks[r])
        return replace(stream, active=active, rows=self.layout.gather(stream.hidden, active), gate=self.set_gate)


def run(method, **options):
    stream = Stream(TOKENS, TOKENS, torch.ones(6, 2, 4))
    return run_recursions(method, stream, lambda layers, stream: stream.rows, RoutingContext(**options))


def mask(*positions):
    return torch.isin(torch.arange(6), torch.tensor(positions)).unsqueeze(1).expand(6, 2)


ALL = mask(*range(6))


def test_tokens_leave_in_turn():
    last = run(Chosen(ALL, mask(1, 2), mask(2)))
    assert torch.equal(last.active.mask(), mask(2))


@pytest.mark.parametrize(
    ("masks", "options", "told"),
    [
        ([mask(1), ALL], {}, "recursion 0 with 2 of 12 candidates"),
        ([ALL, mask(1), mask(2, 3)], {}, "recursion 2 with 4 of 2 candidates"),
        ([ALL, mask(1)], {"fixed_depth": 2}, "recursion 1 with 2 of 12 candidates: .* a fixed depth take every token"),
    ],
)
def test_the_first_recursion_takes_all_and_no_token_comes_back(masks, options, told):
    with pytest.raises(ValueError, match=f"routing=chosen opens {told}"):
        run(Chosen(*masks), **options)


def test_a_gate_is_announced():
    with pytest.raises(ValueError, match="with gate=a tensor, but its weighs=False"):
        run(Chosen(ALL, ALL, gate=torch.ones(12, 1, 1)))


@pytest.mark.parametrize(
    ("gating", "expected"),
    [
        ("weighted", lambda h, y, g: h + g * y),
        ("residual", lambda h, y, g: (1 - g) * h + g * y),
        ("additive", lambda h, y, g: h + y),
    ],
)
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_gating(routing, gating, expected):
    recursion = RecursionConfig(routing=routing, num_recursions=2, router_gating=gating)
    method = method_of(routing)(recursion, build_plan(2, 2, "cycle"), LocalRows())
    hidden, block, gate = torch.randn(3, 6, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, chosen = gate[..., :1], mask(1, 2, 5)
    active, _ = method.layout.keep(TOKENS, chosen)
    rows, gates = method.layout.gather(block, active), method.layout.gather(gate, active)
    got = method.combine(hidden, rows, gates if method.weighs else None, active)
    wanted = torch.where(chosen.unsqueeze(-1), expected(hidden, block, gate), hidden)
    torch.testing.assert_close(got, wanted, atol=1e-15, rtol=0)


def test_ignored_losses_stay_out_of_the_graph():
    weight, rows = torch.ones((), requires_grad=True), torch.zeros(3, requires_grad=True)
    for losses, expected in (("none", None), ("attach", 0.5)):
        RoutingContext(losses=losses).add_loss(rows, weight, 0.5).sum().backward()
        assert weight.grad == expected
