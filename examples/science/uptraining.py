"""Up-training compared: what a dense model, and recursive ones made of it, become on the same further tokens.

    python examples/science/uptraining.py plan --dense runs/dense-llama --output runs/up --seeds 1 2 3 \\
        --iterations 366 --settings --train-data-path data/more_text_document --valid-data-path data/valid_text_document
    python examples/science/uptraining.py train runs/up --jobs 16
    python examples/science/uptraining.py report runs/up --corpus data/valid_text_document --plot up.png

`plan` imports the dense model (a transformers directory) as the start of each recursive one, and writes settings. Runs
of a seed see the same samples. `train` also evaluates each finished run, on the validation corpus. docs/science.md has
results.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from compare import by_document, causal_mode, corpus_pieces, interval

from mor_megatron.command import exit_status
from mor_megatron.config.cli import read_config, save_config
from mor_megatron.files import write_whole
from mor_megatron.pretraining.stopping import EXIT_STOPPED
from mor_megatron.scaling.side_by_side import SideBySide, worst

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"
RANKS = (8, 32, 128)
SCRATCH_LR, WARM_LR = 4e-3, 2e-3
"""Peak learning rates of models that start at random, and of those that start as the dense one."""

RESIDUAL = ("--router-gating", "residual", "--router-alpha", "2", "--router-temperature", "2")
"""Gates near 1 at first, with which a MoR model begins as the recursive one."""
AUXILIARY = ("--router-objective", "aux_router")
"""Routers of their own learn the causal threshold."""


@dataclass(frozen=True)
class Kind:
    """One way to spend the tokens."""

    method: str
    """Settings file of examples/configs."""
    start: tuple[str, ...] | None
    """Flags of tools/import_hf.py; None: random weights."""
    flags: tuple[str, ...] = ()
    """More settings."""


def kinds(dense: Path) -> dict[str, Kind]:
    """All ways by name; `-distilled` is beside a name where the dense model teaches, too."""
    shared = ("--num-recursions", "3", "--sharing-strategy", "middle_cycle", "--initialization")
    recursive, mor = "recursive_nr3", "mor_expert_nr3"
    found = {
        "dense": Kind("vanilla", ()),
        "recursive-scratch": Kind(recursive, None),
        "recursive-average": Kind(recursive, (*shared, "average")),
        "recursive-stepwise": Kind(recursive, (*shared, "stepwise")),
        "mor-scratch": Kind(mor, None),
        "mor-average": Kind(mor, (*shared, "average")),
    }
    for rank in RANKS:
        lora = ("--relaxation", "lora", "--lora-rank", str(rank))
        for adapters in ("svd", "zero"):
            start = (*shared, "average", *lora, "--adapters", adapters)
            found[f"relaxed-{adapters}-{rank}"] = Kind(recursive, start, lora)
    found["mor-svd-32"] = Kind(mor, found["relaxed-svd-32"].start, found["relaxed-svd-32"].flags)
    for name in ("mor-average", "mor-svd-32"):
        found[f"{name}-residual"] = replace(found[name], flags=(*found[name].flags, *RESIDUAL))
        found[f"{name}-residual-aux"] = replace(found[name], flags=(*found[name].flags, *RESIDUAL, *AUXILIARY))
    taught = ("--distill-from", str(dense), "--no-enable-cuda-graph")
    for name in ("recursive-average", "relaxed-svd-32", "mor-average"):
        found[f"{name}-distilled"] = replace(found[name], flags=(*found[name].flags, *taught))
    return found


def run_plan(args: argparse.Namespace) -> None:
    """Import the starts and write a settings file for each run.

    Raises:
        ValueError: settings do not fit, or DIR already contains runs.
        SystemExit: an import failed; carries its exit status.
    """
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"output={args.output} is not empty: give another directory, or delete it")
    wanted = {name: kind for name, kind in kinds(args.dense).items() if not args.only or name in args.only}
    recipes = list(dict.fromkeys(kind.start for kind in wanted.values() if kind.start is not None))
    starts = {recipe: args.output / "starts" / str(number) for number, recipe in enumerate(recipes)}

    def make(recipe: tuple[str, ...]) -> int:
        words = ["--model", args.dense, "--output", starts[recipe], *recipe]
        return subprocess.run([sys.executable, ROOT / "tools" / "import_hf.py", *map(str, words)]).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        if status := max(pool.map(make, recipes), default=0):
            sys.exit(status)
    for seed in args.seeds:
        for name, kind in wanted.items():
            directory = args.output / f"{name}-seed{seed}"
            rate = SCRATCH_LR if kind.start is None else WARM_LR
            words = ["--config", CONFIGS / f"{kind.method}.yaml", args.size, *kind.flags, "--seed", seed]
            run = directory / "run"
            words += ["--train-iters", args.iterations, "--lr", rate, "--save", run, "--load", run]
            words += ["--lr-warmup-iters", args.iterations // 10, "--lr-decay-style", "linear"]
            if kind.start is not None:
                words += ["--branch-from", starts[kind.start], "--finetune"]  # until the run has checkpoints of its own
                if kind.method.startswith("mor"):  # every token at full depth at first, as it was in the dense model
                    words += ["--capacity-warmup-iters", args.iterations // 3]
            config = read_config(list(map(str, [*words, *args.settings])))
            directory.mkdir(parents=True, exist_ok=True)
            save_config(config, directory / "run.yaml")
            print(directory)


def run_train(args: argparse.Namespace) -> int:
    """Train and evaluate runs here, or side by side in processes of their own; the exit status of pretrain_mor.py.

    Raises:
        ValueError: nothing is planned, or no such run.
    """
    planned = sorted(path.parent.name for path in args.directory.glob("*/run.yaml"))
    names = args.runs or planned
    if not planned or not set(names) <= set(planned):
        raise ValueError(f"runs={' '.join(names)} of {args.directory}: use some of those planned: {' '.join(planned)}")
    if args.jobs is None:
        return 0 if all(train(args.directory / name) for name in names) else EXIT_STOPPED
    command = [sys.executable, __file__, "train", str(args.directory), "--runs"]
    return worst(SideBySide(command, args.directory).train(names, args.jobs))


def train(directory: Path) -> bool:
    """Train a run and evaluate it; whether it got to its end."""
    from mor_megatron.pretraining.pretrain import pretrain

    if (directory / "evaluation.json").exists():
        return True
    if not pretrain(read_config(["--config", str(directory / "run.yaml")])):
        return False
    gc.collect()  # engines refer to themselves, so they need the garbage collector
    evaluate(directory)
    return True


def evaluate(directory: Path) -> None:
    """Write evaluation.json: what tools/evaluate.py finds on the whole validation corpus."""
    import torch

    from mor_megatron.evaluation.likelihood import likelihood
    from mor_megatron.evaluation.modes import modes_of
    from mor_megatron.evaluation.report import summary
    from mor_megatron.inference.loading import load_model

    config = read_config(["--config", str(directory / "run.yaml")])
    model, _ = load_model(directory / "run", device="cuda" if torch.cuda.is_available() else "cpu")
    pieces = corpus_pieces(Path(config.data.valid_data_path[0]), config.data.seq_length)
    found = likelihood(model, pieces, modes_of(model.config, fixed_depths=False), batch_size=64)
    facts = summary(model.config, found, config.data.seq_length)
    write_whole(directory / "evaluation.json", json.dumps(facts) + "\n")


def run_report(args: argparse.Namespace) -> None:
    """Print a table of the finished runs, and draw it.

    Raises:
        ValueError: no run has finished.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(args.directory.glob("*/evaluation.json")):
        found.setdefault(path.parent.name.rpartition("-seed")[0], []).append(path)
    if not found:
        raise ValueError(f"{args.directory}: no run has finished: train them")
    names = ["run", "seeds", "unique parameters", "without embedding", "forward MFLOP a token"]
    names += ["NLL causal, ± half the range", "difference to dense (95%)"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    points = {}
    for name in [name for name in kinds(args.directory) if name in found]:
        facts = json.loads(found[name][0].read_text())
        sums, predictions = by_document(found[name], args.corpus)
        nll = sums.sum(1) / predictions.sum()
        points[name] = facts["parameters"]["unique"], nll
        flops = causal_mode(facts)["executed_flops_per_token"] / 1e6
        dense = [args.directory / f"dense-{path.parent.name.rpartition('-')[2]}" / path.name for path in found[name]]
        paired = [number for number, path in enumerate(dense) if path.exists()]
        difference = "-"
        if paired:
            base, _ = by_document([dense[number] for number in paired], args.corpus)
            difference = "{:+.4f} ({:+.4f} .. {:+.4f})".format(*interval(sums[paired] - base, predictions))
        half = f" ± {(nll.max() - nll.min()) / 2:.4f}" if len(nll) > 1 else ""
        cells = [name, len(nll), f"{points[name][0]:,}", f"{facts['parameters']['non_embedding']:,}", f"{flops:.2f}"]
        cells += [f"{nll.mean():.4f}{half}", difference]
        print(f"| {' | '.join(map(str, cells))} |")
    draw(points, args.plot)


FAMILIES = {"dense": "o", "recursive": "s", "relaxed-svd": "^", "relaxed-zero": "v", "mor": "D"}
"""Beginning of a name -> marker."""


def draw(points: dict[str, tuple[int, np.ndarray]], path: Path) -> None:
    """Losses of all seeds over unique parameters, a marker for each family; filled: taught by the dense model.

    Those from scratch are far above the others and are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (family, marker) in enumerate(FAMILIES.items()):
        for name in (name for name in points if name.startswith(family) and not name.endswith("-scratch")):
            parameters, nll = points[name]
            face = f"C{number}" if name.endswith("-distilled") else "none"
            axes.scatter([parameters] * len(nll), nll, marker=marker, color=f"C{number}", facecolors=face, s=28)
            label = name.removeprefix(f"{family}-")
            axes.annotate(label, (parameters, nll.mean()), (6, 0), textcoords="offset points", fontsize=7, va="center")
    for number, (family, marker) in enumerate(FAMILIES.items()):
        axes.scatter([], [], marker=marker, color=f"C{number}", facecolors="none", label=family)
    axes.margins(x=0.15)
    axes.set_xlabel("unique parameters")
    axes.set_ylabel("validation loss, causal (nats per token)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Exit status 0: done; 2: settings do not fit, or files are missing; 85: training was stopped and saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="import the dense model, and write settings")
    plan.set_defaults(run=run_plan)
    plan.add_argument("--dense", type=Path, required=True, help="transformers directory of the LLaMA family")
    plan.add_argument("--output", type=Path, required=True)
    plan.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    plan.add_argument(
        "--size", type=Path, default=Path(__file__).with_name("5m.yaml"), help="settings of the dense model"
    )
    plan.add_argument("--iterations", type=int, required=True)
    plan.add_argument("--jobs", type=int, default=1, help="so many imports at a time")
    plan.add_argument("--only", nargs="+", help="some of the ways")
    plan.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="flags for every run; must come last")
    training = commands.add_parser("train", help="train and evaluate all runs")
    training.set_defaults(run=run_train)
    training.add_argument("directory", type=Path)
    training.add_argument("--runs", nargs="+", help="only these")
    training.add_argument("--jobs", type=int, help="so many side by side, each in a process of its own")
    reporting = commands.add_parser("report", help="print a table of finished runs and draw it")
    reporting.set_defaults(run=run_report)
    reporting.add_argument("directory", type=Path)
    reporting.add_argument("--corpus", type=Path, required=True, help="prefix of the validation corpus")
    reporting.add_argument("--plot", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    return exit_status(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
