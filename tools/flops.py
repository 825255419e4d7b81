"""Parameters, FLOPs and key/value memory of a model, compared with the vanilla model of the same unrolled depth.

    python tools/flops.py --config examples/configs/mor_expert_nr3.yaml examples/configs/360m.yaml
    python tools/flops.py --config ... --budget 5e18 --fractions 1 0.7 0.4 --recompute-granularity full
    python tools/flops.py --budget 16.5e18

Flags that are not listed below are settings of the run. Without --config, prints the iterations of the paper's models
at 360M for a budget, beside the published ones. See mor_megatron/planning/accounting.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mor_megatron.command import exit_status
from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.planning.accounting import (
    count_parameters,
    dense_equivalent,
    executed_flops_per_token,
    iterations_for_budget,
    kv_bytes_per_token,
    paper_flops_per_token,
    planned_fractions,
    training_flops_per_token,
)
from mor_megatron.planning.teacher import beside

PRESETS = Path(__file__).resolve().parents[1] / "examples" / "configs"
PAPER = ("vanilla", "recursive_nr4", "mor_expert_nr2", "mor_expert_nr3", "mor_expert_nr4", "mor_expert_nr3_kv_sharing")
"""Methods with published iterations at 360M and 16.5e18 FLOPs; each preset states them."""

Rows = list[tuple[str, float, float]]
"""Name of a count, its value for the model, and its value for the unrolled model."""


def load(files: list[Path], settings: list[str]) -> Config:
    """A validated configuration, with its vocabulary size resolved."""
    config = read_config(["--config", *map(str, files), *settings])
    parallel = config.parallel
    config = validate(config, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    return resolve_vocabulary(config, configured_tokenizer(config.data))


def rows(
    config: Config, fractions: tuple[float, ...] | None, budget: float | None, teacher: Config | None = None
) -> Rows:
    """All counts of a model.

    Args:
        fractions: fraction of tokens at each recursion, [Nr]; default: as planned.
        budget: forward FLOPs by the paper's accounting.
        teacher: settings of the model of `distill_from`, which teaches either.
    """
    result: Rows = []
    teacher = None if teacher is None else beside(config, teacher)

    def add(name: str, count) -> None:
        result.append((name, count(config, fractions), count(dense_equivalent(config), None)))

    add("unique parameters", lambda c, _: count_parameters(c).unique)
    add("  without embedding and head", lambda c, _: count_parameters(c).non_embedding)
    add("paper: forward FLOPs a token, as planned", lambda c, _: paper_flops_per_token(c))
    add("executed: forward FLOPs a token", lambda c, f: executed_flops_per_token(c, f))
    add("  training, model FLOPs a token (MFU)", lambda c, f: training_flops_per_token(c, f, teacher).model)
    add("  training, hardware FLOPs a token (HFU)", lambda c, f: training_flops_per_token(c, f, teacher).hardware)
    add("bytes of keys and values a token, 16 bits", kv_bytes_per_token)
    if budget is not None:
        add(f"iterations for {budget:g} of the paper's FLOPs", lambda c, _: iterations_for_budget(c, budget))
    return result


def table(result: Rows) -> str:
    """A table with one line per count: name, model, unrolled, model / unrolled."""
    lines = [f"{'':46}{'model':>18}{'unrolled':>18}{'ratio':>9}"]
    for name, model, unrolled in result:
        lines.append(f"{name:46}{model:>18,.0f}{unrolled:>18,.0f}{model / unrolled:>9.3f}")
    return "\n".join(lines)


def show_model(files: list[Path], settings: list[str], fractions: list[float] | None, budget: float | None) -> None:
    """Print one configuration's counts.

    Raises:
        ValueError: the settings do not fit, there is no vocabulary, or the number of fractions is wrong.
    """
    config = load(files, settings)
    count = config.recursion.num_recursions
    if fractions is not None and (len(fractions) != count or not all(0 <= value <= 1 for value in fractions)):
        raise ValueError(f"fractions={fractions} must be as many as num-recursions={count}, from 0 to 1")
    print(config.plan.table().splitlines()[0])
    shown = " ".join(f"{value:.3g}" for value in fractions or planned_fractions(config))
    recompute = config.training.recompute_granularity or "nothing"
    print(
        f"routing {config.recursion.routing}, tokens at each recursion {shown}, sequences of {config.data.seq_length}, "
        f"vocabulary {config.model.vocab_size}, recomputed: {recompute}"
    )
    teacher = teacher_settings(config)
    print(table(rows(config, None if fractions is None else tuple(fractions), budget, teacher)))


def show_paper(budget: float) -> None:
    """Print the iterations of the paper's models at 360M for a budget."""
    print(f"{'360M':28}{'layers':>7}{'unique':>7}{'MFLOP a token':>15}{'iterations':>12}{'published, 16.5e18':>20}")
    for name in PAPER:
        config = load([PRESETS / f"{name}.yaml", PRESETS / "360m.yaml"], [])
        plan = config.plan
        print(
            f"{name:28}{plan.num_layers:>7}{plan.num_physical_layers:>7}{paper_flops_per_token(config) / 1e6:>15.1f}"
            f"{iterations_for_budget(config, budget):>12}{config.training.train_iters:>20}"
        )


def run(args: argparse.Namespace, settings: list[str]) -> None:
    """Print the counts of a configuration, or the iterations for a budget.

    Raises:
        ValueError: see `show_model`; or there is nothing to print.
    """
    if args.budget is not None and not 0 < args.budget < float("inf"):
        raise ValueError(f"budget={args.budget} must be above 0, such as 16.5e18")
    if args.config is not None:
        show_model(args.config, settings, args.fractions, args.budget)
    elif args.budget is None or settings or args.fractions:
        raise ValueError("--config names no file: give one or more, or --budget alone for the paper's models")
    else:
        show_paper(args.budget)


def main() -> int:
    """Exit status 0: done; 2: the settings do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", help="YAML files of a run; later ones win")
    parser.add_argument("--budget", type=float, help="forward FLOPs by the paper's accounting, such as 16.5e18")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        help="measured fraction of tokens at each recursion (tokens_per_recursion_*); default: as planned",
    )
    args, settings = parser.parse_known_args()
    return exit_status(lambda: run(args, settings))


if __name__ == "__main__":
    sys.exit(main())
