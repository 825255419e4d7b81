"""A family of isoFLOP runs compared with its first method: at equal FLOPs, and at equal tokens.

    for run in runs/iso/*/decay-*[0-9]; do
        python tools/evaluate.py --model $run --text valid.jsonl --seq-length 512 --sequences 100000 \\
            --no-fixed-depths --output $(dirname $run)/eval-${run##*/decay-}.json
    done
    python examples/science/family.py runs/iso --corpus data/valid_text_document --plot family.png

Every run needs the evaluation that the loop writes, beside its directory: eval-BUDGET.json. Intervals are those of
compare.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from compare import by_document, causal_mode, interval

from mor_megatron.command import exit_status
from mor_megatron.scaling.family import read_family
from mor_megatron.scaling.results import RunResult, read_result

ROUNDING = 0.005
"""Relative difference of numbers of tokens that are equal but for whole iterations."""


@dataclass(frozen=True)
class Cell:
    """One method and budget: its finished and evaluated seeds."""

    runs: dict[int, RunResult]
    """By seed."""

    @property
    def any(self) -> RunResult:
        """One of them: what does not depend on the seed."""
        return next(iter(self.runs.values()))

    def files(self, seeds: Iterable[int]) -> list[Path]:
        """The evaluations of some seeds."""
        return [evaluation(self.runs[seed]) for seed in seeds]


def evaluation(result: RunResult) -> Path:
    """The evaluation of a run."""
    return Path(result.run.directory) / f"eval-{result.run.label}.json"


def read_cells(directory: Path) -> dict[tuple[str, float], Cell]:
    """Method and budget -> its runs, those that have finished and were evaluated.

    Raises:
        ValueError: there is none.
    """
    cells: dict[tuple[str, float], Cell] = {}
    for run in read_family(directory):
        result = read_result(run)
        if result is None or not evaluation(result).exists():
            print(f"{run.directory}, {run.label}: not finished or not evaluated, left out", file=sys.stderr)
            continue
        cells.setdefault((run.method, run.budget), Cell({})).runs[run.seed] = result
    if not cells:
        raise ValueError(f"{directory}: no run has finished and was evaluated: train and evaluate them (--help)")
    return cells


def losses_table(cells: dict[tuple[str, float], Cell], corpus: Path) -> str:
    """Every method and budget."""
    names = ["budget", "method", "seeds", "parameters", "tokens", "executed FLOPs", "NLL top-k", "NLL causal", "95%"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for (method, budget), cell in cells.items():
        files = cell.files(sorted(cell.runs))
        facts = [json.loads(path.read_text()) for path in files]
        topk = np.mean([next(iter(fact["ways"].values()))["nll"] for fact in facts])
        seeds = ", ".join(f"{causal_mode(fact)['nll']:.4f}" for fact in facts)
        mean, low, high = interval(*by_document(files, corpus))
        flops = np.mean([result.executed_flops for result in cell.runs.values()])
        values = [f"{budget:.4g}", method, str(len(files)), f"{cell.any.parameters:,}", f"{cell.any.tokens:,}"]
        values += [f"{flops:.3g}", f"{topk:.4f}", f"{mean:.4f} ({seeds})", f"{low:.3f} .. {high:.3f}"]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def differences_table(cells: dict[tuple[str, float], Cell], corpus: Path, first: str) -> str:
    """Every other method against the first: at the same budget, and where it saw as many tokens."""
    names = ["method", "budget", f"{first} of equal", "tokens", f"{first}'s tokens", f"{first}'s executed FLOPs"]
    names += ["difference of NLL", "95%", "each seed"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for (method, budget), cell in cells.items():
        for (base_method, base_budget), base in cells.items():
            tokens = base.any.tokens / cell.any.tokens
            equal = "FLOPs" if base_budget == budget else "tokens" if abs(tokens - 1) < ROUNDING else None
            seeds = sorted(set(cell.runs) & set(base.runs))
            if method == first or base_method != first or equal is None or not seeds:
                continue
            here, predictions = by_document(cell.files(seeds), corpus)
            there, _ = by_document(base.files(seeds), corpus)
            mean, low, high = interval(here - there, predictions)
            each = ", ".join(f"{value:+.4f}" for value in (here - there).sum(1) / predictions.sum())
            values = [method, f"{budget:.4g}", equal, f"{cell.any.tokens:,}", f"{base.any.tokens:,}"]
            flops = [np.mean([r.executed_flops for r in side.runs.values()]) for side in (base, cell)]
            values += [f"{flops[0] / flops[1]:.2f} of the method's", f"{mean:+.4f}", f"{low:+.4f} .. {high:+.4f}", each]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) if len(lines) > 2 else f"nothing to compare with {first} yet"


def draw(cells: dict[tuple[str, float], Cell], path: Path) -> None:
    """Causal losses over tokens and over executed FLOPs: a line through the means, a mark for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, method in enumerate(dict.fromkeys(method for method, _ in cells)):
        mine = [cell for (name, _), cell in cells.items() if name == method]
        parameters = mine[0].any.parameters
        for axis, (value, unit) in zip(axes, (("tokens", 1e6), ("executed_flops", 1e15)), strict=True):
            points = [
                [
                    (getattr(r, value) / unit, causal_mode(json.loads(evaluation(r).read_text()))["nll"])
                    for r in c.runs.values()
                ]
                for c in mine
            ]
            label = f"{method}, {parameters / 1e6:.1f}M parameters"
            means = np.array([np.mean(group, axis=0) for group in points])
            axis.plot(*means.T, "_-", color=f"C{number}", markersize=14, label=label)
            axis.scatter(*np.array([point for group in points for point in group]).T, color=f"C{number}", s=12)
            axis.set_xlabel({"tokens": "tokens (1e6)", "executed_flops": "executed training FLOPs (1e15)"}[value])
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, causal (nats per token)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    """Print both tables and draw.

    Raises:
        ValueError: there is no family, or nothing to compare.
    """
    cells = read_cells(args.directory)
    first = read_family(args.directory)[0].method
    print(losses_table(cells, args.corpus), differences_table(cells, args.corpus, first), sep="\n\n")
    draw(cells, args.plot)


def main() -> int:
    """Exit status 0: done; 2: files are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the family")
    parser.add_argument("--corpus", type=Path, required=True, help="prefix of the held-out text, indexed")
    parser.add_argument("--plot", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
