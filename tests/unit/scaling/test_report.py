"""Fits and tables for known results."""

from __future__ import annotations

import math

import pytest

from mor_megatron.scaling import report
from mor_megatron.scaling.family import Run
from mor_megatron.scaling.fit import fit_parabola, fit_power_law
from mor_megatron.scaling.results import RunResult

SIZES = {"a": 1e5, "b": 2e5, "c": 4e5, "d": 8e5}


def test_parabola_is_found_again():
    fit = fit_parabola(list(SIZES.values()), [3.0 + 0.2 * math.log(n / 3e5) ** 2 for n in SIZES.values()])
    assert (fit.optimum, fit.minimum, fit.curvature) == pytest.approx((3e5, 3.0, 0.2))
    assert fit.inside
    assert fit(6e5) == pytest.approx(3.0 + 0.2 * math.log(2) ** 2)
    beyond = fit_parabola(list(SIZES.values()), [3.0 + 0.2 * math.log(n / 3e6) ** 2 for n in SIZES.values()])
    assert beyond.optimum == pytest.approx(3e6)
    assert not beyond.inside


def test_no_parabola():
    assert fit_parabola([1e5, 2e5, 2e5], [3.0, 2.9, 2.8]) is None
    assert fit_parabola(list(SIZES.values()), [3.0 - 0.2 * math.log(n / 3e5) ** 2 for n in SIZES.values()]) is None


def test_power_law_is_found_again():
    law = fit_power_law([1e18, 2e18, 8e18], [7 * c**0.45 for c in (1e18, 2e18, 8e18)])
    assert (law.coefficient, law.exponent) == pytest.approx((7, 0.45))
    assert fit_power_law([1e18, 2e18], [1.0, 2.0]) is None


def result(method: str, size: str, seed: int, budget: float, loss: float) -> RunResult:
    run = Run(method, size, seed, budget, 100, 80, f"f/{method}-{size}-seed{seed}")
    return RunResult(run, int(SIZES[size]), int(2 * SIZES[size]), 1000, 3e12, loss - 0.01, loss)


def family() -> report.Family:
    """Optima at 2e5, 2.83e5 and 4e5 (budget^0.5); `other` is 0.1 better, seed 2 is 0.02 worse."""
    results = []
    for budget in (1e12, 2e12, 4e12):
        optimum = 2e5 * (budget / 1e12) ** 0.5
        for method, gain in (("first", 0.0), ("other", 0.1)):
            for size in reversed(SIZES):
                for seed in (1, 2):
                    curve = 3.0 + 0.2 * math.log(SIZES[size] / optimum) ** 2
                    results.append(result(method, size, seed, budget, curve - gain + 0.02 * (seed - 1)))
    return report.group(results)


def test_group_sorts_budgets_and_sizes():
    grouped = family()
    assert list(grouped) == [1e12, 2e12, 4e12]
    assert list(grouped[1e12]) == ["first", "other"]
    assert [cell.first.run.size for cell in grouped[1e12]["other"]] == list("abcd")
    assert all(len(cell.results) == 2 for cell in grouped[1e12]["other"])


def test_tables_say_what_is_in_the_results():
    grouped = family()
    rows = report.runs_table(grouped).splitlines()
    assert len(rows) == 2 + 3 * 2 * 4
    assert rows[2].split(" | ")[-3:] == ["3.0961", "3.1061", "0.0100 |"]
    first = report.optima_table(grouped).splitlines()[2]
    assert "| b | 3.0000 | 3.0100 | 200,000 | 3.0100 | 3.0000, 3.0200 |" in first
    gaps = report.differences_table(grouped).splitlines()
    assert gaps[0] == "| budget | method | a | b | c | d |"
    assert gaps[2] == f"| 1e+12 | other - first |{' -0.100 ± 0.000 |' * 4}"
    assert report.growth(grouped)[0] == "first: best parameters ~ budget^0.50, from 3 budgets."


def test_what_is_not_known_is_not_made_up(tmp_path):
    one_seed = report.group([result("first", size, 1, 1e12, loss) for size, loss in (("a", 3.0), ("b", 2.9))])
    assert "one seed" in report.runs_table(one_seed)
    assert "| no minimum | - | - |" in report.optima_table(one_seed)
    assert report.growth(one_seed) == ["first: 0 of 1 budgets have a minimum among the sizes; a law needs three."]
    report.plot(one_seed, tmp_path / "one.png")
    pair = [result("first", "a", 1, 1e12, 3.0), result("first", "b", 1, 1e12, 3.0), result("other", "b", 1, 1e12, 2.75)]
    assert "| other - first | - | -0.250 (one seed) |" in report.differences_table(report.group(pair))
    falling = [result("first", size, 1, 1e12, 3.0 + 0.1 * math.log(SIZES[size] / 8e6) ** 2) for size in SIZES]
    assert "8,000,000 (outside the sizes)" in report.optima_table(report.group(falling))


def test_picture(tmp_path):
    report.plot(family(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
