"""Tables (Markdown) and the plot of an isoFLOP family, with means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mor_megatron.scaling.fit import Parabola, fit_parabola, fit_power_law
from mor_megatron.scaling.results import RunResult
from mor_megatron.training.metrics import THRESHOLD_LOSS, TOPK_LOSS


@dataclass(frozen=True)
class Cell:
    """Results of one budget, method and size, one per seed."""

    results: tuple[RunResult, ...]

    @property
    def first(self) -> RunResult:
        """The first result, for everything that does not depend on the seed."""
        return self.results[0]

    def losses(self, name: str) -> list[float]:
        """One loss per seed, nats per token."""
        return [result.loss(name) for result in self.results]

    def mean(self, name: str) -> float:
        """Mean of a loss over the seeds."""
        return statistics.fmean(self.losses(name))

    def half_range(self, name: str) -> float:
        """Half the range of a loss over the seeds."""
        return (max(self.losses(name)) - min(self.losses(name))) / 2


Family = dict[float, dict[str, list[Cell]]]
"""Budget -> method -> cells by parameters."""


def group(results: Iterable[RunResult]) -> Family:
    """Budgets ascending, methods in the order of the results, sizes ascending."""
    results = list(results)
    family: Family = {}
    for budget in sorted({result.run.budget for result in results}):
        here = [result for result in results if result.run.budget == budget]
        family[budget] = {}
        for method in dict.fromkeys(result.run.method for result in here):
            mine = [result for result in here if result.run.method == method]
            sizes = dict.fromkeys(result.run.size for result in sorted(mine, key=lambda result: result.parameters))
            family[budget][method] = [Cell(tuple(r for r in mine if r.run.size == size)) for size in sizes]
    return family


def runs_table(family: Family) -> str:
    """A table with one row per budget, method and size."""
    rows = [
        "| budget | method | size | parameters | unrolled | iterations | tokens | executed FLOPs | NLL top-k "
        "| NLL threshold | ± over seeds |",
        "|---|" + "---|" * 10,
    ]
    for budget, methods in family.items():
        for method, cells in methods.items():
            for cell in cells:
                first, executed = cell.first, statistics.fmean(result.executed_flops for result in cell.results)
                spread = f"{cell.half_range(THRESHOLD_LOSS):.4f}" if len(cell.results) > 1 else "one seed"
                rows.append(
                    f"| {budget:.3g} | {method} | {first.run.size} | {first.parameters:,} | {first.unrolled:,} "
                    f"| {first.run.iterations:,} | {first.tokens:,} | {executed:.3g} | {cell.mean(TOPK_LOSS):.4f} "
                    f"| {cell.mean(THRESHOLD_LOSS):.4f} | {spread} |"
                )
    return "\n".join(rows)


def optima_table(family: Family) -> str:
    """A table with the best trained size and the minimum of the parabola for every budget and method."""
    rows = [
        "| budget | method | best size trained | NLL top-k | NLL threshold | parameters at the parabola's minimum "
        "| NLL threshold there | minimum of each seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget, methods in family.items():
        for method, cells in methods.items():
            best = min(cells, key=lambda cell: cell.mean(THRESHOLD_LOSS))
            fit = parabola(cells)
            optimum = "no minimum" if fit is None else f"{fit.optimum:,.0f}"
            if fit is not None and not fit.inside:
                optimum += " (outside the sizes)"
            rows.append(
                f"| {budget:.3g} | {method} | {best.first.run.size} | {best.mean(TOPK_LOSS):.4f} "
                f"| {best.mean(THRESHOLD_LOSS):.4f} | {optimum} | {'-' if fit is None else f'{fit.minimum:.4f}'} "
                f"| {_minima(cells)} |"
            )
    return "\n".join(rows)


def differences_table(family: Family) -> str:
    """Threshold loss of each method minus that of the first, at the same budget, size and seed; below 0 is better.

    Gives the mean over the seeds and half their range: a difference smaller than the range is noise.
    """
    sizes = dict.fromkeys(
        cell.first.run.size for methods in family.values() for cells in methods.values() for cell in cells
    )
    rows = [f"| budget | method | {' | '.join(sizes)} |", "|---|---|" + "---|" * len(sizes)]
    for budget, methods in family.items():
        reference, *others = methods
        theirs = {(r.run.size, r.run.seed): r.threshold for cell in methods[reference] for r in cell.results}
        for method in others:
            shown = {size: "-" for size in sizes}
            for cell in methods[method]:
                keys = [(r.run.size, r.run.seed) for r in cell.results]
                gaps = [r.threshold - theirs[key] for r, key in zip(cell.results, keys, strict=True) if key in theirs]
                if gaps:
                    spread = f" ± {(max(gaps) - min(gaps)) / 2:.3f}" if len(gaps) > 1 else " (one seed)"
                    shown[cell.first.run.size] = f"{statistics.fmean(gaps):+.3f}{spread}"
            rows.append(f"| {budget:.3g} | {method} - {reference} | {' | '.join(shown.values())} |")
    return "\n".join(rows)


def growth(family: Family) -> list[str]:
    """How the best size grows with the budget, one sentence per method."""
    lines = []
    for method in dict.fromkeys(method for methods in family.values() for method in methods):
        fits = {budget: parabola(methods[method]) for budget, methods in family.items() if method in methods}
        inside = {budget: fit.optimum for budget, fit in fits.items() if fit is not None and fit.inside}
        law = fit_power_law(list(inside), list(inside.values()))
        if law is None:
            lines.append(
                f"{method}: {len(inside)} of {len(fits)} budgets have a minimum among the sizes; a law needs three."
            )
        else:
            lines.append(f"{method}: best parameters ~ budget^{law.exponent:.2f}, from {len(inside)} budgets.")
    return lines


def parabola(cells: Sequence[Cell], name: str = THRESHOLD_LOSS) -> Parabola | None:
    """Fit a parabola to one budget and method, over all seeds."""
    points = [(result.parameters, result.loss(name)) for cell in cells for result in cell.results]
    return fit_parabola(*zip(*points, strict=True))


def _minima(cells: Sequence[Cell]) -> str:
    """The minimum of the parabola for each seed separately."""
    minima = []
    for seed in dict.fromkeys(result.run.seed for cell in cells for result in cell.results):
        mine = [(r.parameters, r.threshold) for cell in cells for r in cell.results if r.run.seed == seed]
        fit = fit_parabola(*zip(*mine, strict=True))
        minima.append("-" if fit is None else f"{fit.minimum:.4f}")
    return ", ".join(minima)


def plot(family: Family, path: Path) -> None:
    """Plot loss against parameters, one panel per budget.

    Threshold losses are filled and fitted, top-k losses are hollow, and bars show the range of the seeds.
    """
    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(family), figsize=(4.2 * len(family), 4), sharex=True, layout="constrained", squeeze=False
    )
    for panel, (budget, methods) in zip(panels[0], family.items(), strict=True):
        for index, (method, cells) in enumerate(methods.items()):
            x, colour = [cell.first.parameters for cell in cells], f"C{index}"
            bars = [[cell.mean(THRESHOLD_LOSS) - min(cell.losses(THRESHOLD_LOSS)) for cell in cells]]
            bars.append([max(cell.losses(THRESHOLD_LOSS)) - cell.mean(THRESHOLD_LOSS) for cell in cells])
            y = [cell.mean(THRESHOLD_LOSS) for cell in cells]
            panel.errorbar(x, y, bars, fmt="o", color=colour, capsize=3, label=f"{method}, threshold")
            topk = [cell.mean(TOPK_LOSS) for cell in cells]
            if topk != y:
                panel.plot(x, topk, "o", mfc="none", ms=10, color=colour, label=f"{method}, top-k")
            fit = parabola(cells)
            if fit is not None:
                curve = np.geomspace(min(x), max(x))
                panel.plot(curve, [fit(n) for n in curve], "--", lw=1, color=colour)
        panel.set(xscale="log", title=f"{budget:.3g} forward FLOPs", xlabel="unique parameters without embedding")
    panels[0][0].set_ylabel("validation loss (nats a token)")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
