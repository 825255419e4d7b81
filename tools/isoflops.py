"""IsoFLOP families: which method and which size make the best use of a FLOPs budget. See docs/science.md.

    python tools/isoflops.py plan --output runs/iso --budgets 2e18 5e18 16.5e18 --seeds 1 2 \\
        --methods examples/configs/vanilla.yaml examples/configs/mor_expert_nr3.yaml \\
        --sizes examples/configs/135m.yaml examples/configs/360m.yaml examples/configs/730m.yaml \\
        --settings --data-path data/docs_text_document
    python tools/isoflops.py train runs/iso
    python tools/isoflops.py report runs/iso
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mor_megatron.command import exit_status
from mor_megatron.pretraining.stopping import EXIT_STOPPED
from mor_megatron.scaling import report
from mor_megatron.scaling.family import FAMILY, Recipe, Run, plan_family, read_family, write_family
from mor_megatron.scaling.results import read_result
from mor_megatron.scaling.side_by_side import SideBySide, worst


def run_plan(args: argparse.Namespace) -> None:
    """Write the settings and commands of a family, and print its cost.

    Raises:
        ValueError: settings do not fit, or DIR already contains a family.
    """
    if (args.output / FAMILY).exists():
        raise ValueError(f"output={args.output} already contains a family: give another directory, or delete it")
    recipe = Recipe(args.decay_fraction, args.warmup_fraction)
    family = plan_family(args.output, args.methods, args.sizes, args.budgets, args.seeds, args.settings, recipe)
    write_family(args.output, family)
    print(f"{'model':44}{'budget':>10}{'iterations':>12}{'of them trunk':>15}{'tokens':>18}")
    for run, _, decay in family:
        tokens = run.iterations * decay.training.global_batch_size * decay.data.seq_length
        name = Path(run.directory).name
        print(f"{name:44}{run.budget:>10.3g}{run.iterations:>12,}{run.branch:>15,}{tokens:>18,}")
    alone, shared = costs([run for run, *_ in family])
    print(
        f"{len(family)} runs, {shared:.4g} forward FLOPs by the paper's accounting; without the shared trunks it would "
        f"be {alone:.4g}\n{args.output}/run.sh runs them, or `isoflops.py train {args.output}` in one process"
    )


def costs(runs: list[Run]) -> tuple[float, float]:
    """Forward FLOPs by the paper's accounting: of every run on its own, and with shared trunks."""
    alone = sum(run.budget for run in runs)
    trunks: dict[str, float] = {}
    for run in runs:
        trunk = run.budget * run.branch / run.iterations
        trunks[run.directory] = max(trunks.get(run.directory, 0.0), trunk)
    decays = sum(run.budget * (1 - run.branch / run.iterations) for run in runs)
    return alone, sum(trunks.values()) + decays


def run_train(args: argparse.Namespace) -> int:
    """Train a family in this process, or its models in several; the exit status is that of pretrain_mor.py.

    Raises:
        ValueError: there is no family or no such model, or a run's settings, data or checkpoint do not fit.
    """
    family = read_family(args.directory)
    models = list(dict.fromkeys(Path(run.directory).name for run in family))
    chosen = args.models or models
    for name in chosen:
        if name not in models:
            raise ValueError(f"models={name} is not in {args.directory}: use some of {', '.join(models)}")
    if args.jobs is None:
        from mor_megatron.scaling.train import train_family  # loads Megatron-core

        runs = [run for run in family if Path(run.directory).name in chosen]
        return 0 if train_family(runs) else EXIT_STOPPED
    command = [sys.executable, __file__, "train", str(args.directory), "--models"]
    return worst(SideBySide(command, args.directory).train(chosen, args.jobs))


def run_report(args: argparse.Namespace) -> None:
    """Print tables and write the plot.

    Raises:
        ValueError: there is no family, or none of its runs has finished.
    """
    runs = [run for run in read_family(args.directory) if args.seeds is None or run.seed in args.seeds]
    results = [read_result(run) for run in runs]
    missing = [f"{run.directory}/{run.decay.name}" for run, result in zip(runs, results, strict=True) if result is None]
    finished = [result for result in results if result is not None]
    if not finished:
        raise ValueError(
            f"{args.directory}: no run has finished: train the family, for example with {args.directory}/run.sh"
        )
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        print(f"{len(missing)} of {len(runs)} runs have not finished and are left out: {names}", file=sys.stderr)
    family = report.group(finished)
    plot = args.plot or args.directory / "isoflops.png"
    report.plot(family, plot)
    print(report.runs_table(family), report.optima_table(family), report.differences_table(family), sep="\n\n")
    print("\n" + "\n".join(report.growth(family)))
    print(f"\npicture: {plot}", file=sys.stderr)


def main() -> int:
    """Exit status 0: done; 2: settings do not fit, or files are missing; 85: training was stopped early and saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="write the settings of every run")
    plan.set_defaults(run=run_plan)
    plan.add_argument("--output", type=Path, required=True, help="directory for the family")
    plan.add_argument("--budgets", type=float, nargs="+", required=True, help="forward FLOPs by the paper's accounting")
    plan.add_argument(
        "--methods",
        type=Path,
        nargs="+",
        required=True,
        help="settings files, one per method; differences are to the first",
    )
    plan.add_argument(
        "--sizes", type=Path, nargs="+", required=True, help="settings files, one per size, read after the method's"
    )
    plan.add_argument("--seeds", type=int, nargs="+", default=[1234], help="seeds for weights and data order")
    plan.add_argument(
        "--decay-fraction", type=float, default=0.2, help="fraction of a run over which the learning rate decays"
    )
    plan.add_argument(
        "--warmup-fraction", type=float, default=0.05, help="warm-up, as a fraction of the run with the smallest budget"
    )
    plan.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="flags for every run; must come last")

    train = commands.add_parser("train", help="train all runs, one after another, in one process or in several")
    train.set_defaults(run=run_train)
    train.add_argument("directory", type=Path, help="of the family")
    train.add_argument("--models", nargs="+", help="only these, by the names of their directories")
    train.add_argument("--jobs", type=int, help="train so many models side by side, each in a process of its own")

    reporting = commands.add_parser(
        "report", help="print tables and fits, and plot them, from metrics.jsonl of finished runs"
    )
    reporting.set_defaults(run=run_report)
    reporting.add_argument("directory", type=Path, help="of the family")
    reporting.add_argument("--seeds", type=int, nargs="+", help="seeds to use; default: all")
    reporting.add_argument("--plot", type=Path, help="default: DIR/isoflops.png")
    args = parser.parse_args()
    return exit_status(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
