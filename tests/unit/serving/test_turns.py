"""The number of sequences that wait for a turn follows from what passes and turns cost."""

from __future__ import annotations

import numpy as np
import pytest

from mor_megatron.serving import turns
from mor_megatron.serving.turns import SHARES, Cost, Turns, best_share, simulate

EVEN = np.array([3.0, 2.0, 1.0])  # depths 1, 2 and 3 are equally frequent


def test_simulation_of_the_two_extremes():
    """Depth-wise: as many passes and turns as the mean depth. Lock-step: Nr passes a turn."""
    passes, counted = simulate(np.array([0.01, 1.0]), np.array([1 / 3, 1 / 2, 1.0]))
    np.testing.assert_allclose(passes, [2.0, 3.0], rtol=0.04)
    np.testing.assert_allclose(counted, [2.0, 1.0], rtol=0.04)


def test_dear_turns_are_waited_for():
    shares = [best_share(1.0, cost, EVEN) for cost in (0.0, 0.5, 1.0, 2.0)]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 <= 0.75 <= shares[-1]


def test_depths_without_choice_are_taken_in_lock_step():
    assert best_share(1.0, 1.0, np.array([5.0, 5.0, 5.0])) >= 0.5
    assert best_share(1.0, 1.0, np.array([5.0])) in SHARES
    with np.errstate(all="raise"):
        assert best_share(1.0, 1.0, np.array([5.0, 0.0, 0.0])) in SHARES


def test_line_through_noise_and_without_spread():
    cost, random = Cost(), np.random.default_rng(0)
    assert cost.line == (0.0, 0.0)
    cost.add(4, 3.0)
    cost.add(4, 5.0)
    assert cost.line == (pytest.approx(4.0, rel=0.01), 0.0)
    for rows in random.integers(1, 33, 500).tolist():
        cost.add(rows, 2.0 + 0.25 * rows + random.normal(0.0, 0.1))
    assert cost.line == (pytest.approx(2.0, abs=0.1), pytest.approx(0.25, abs=0.01))


@pytest.mark.parametrize(("turn_cost", "wide"), [(0.1, False), (5.0, True)])
def test_rule_learns_from_what_it_sees(turn_cost, wide):
    rule = Turns(None, 3)
    for i in range(turns.EVERY):
        rule.saw_pass(1 + i % 8, 1.0 + 0.1 * (i % 8))
        rule.saw_turn(1 + i % 8, turn_cost + 0.1 * (i % 8), [1 + i % 3])
    assert rule.is_due(4, 8) is not wide
    assert rule.is_due(8, 8)


def test_fixed_number():
    rule = Turns(3, 3)
    assert [rule.is_due(waiting, 8) for waiting in (2, 3)] == [False, True]
