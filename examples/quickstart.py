"""From real text to two trained models in five minutes on two CPU cores: what `make quickstart` runs.

Collects a corpus, trains a tokenizer, indexes the text, and pretrains a Mixture-of-Recursions model and a vanilla model
of the same unrolled depth with the commands that a large run uses. Then it compares the two in a table and a plot, and
draws the recursions that each token of a sentence takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mor_megatron.config.cli import read_config
from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
from mor_megatron.planning.accounting import count_parameters

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
MODELS = {"MoR": "mor_expert_nr3", "vanilla": "vanilla"}
"""Name in the table -> method preset."""
VOCABULARY = 4096
SENTENCE = "The sea was calm, and the captain said to the men of the ship that the war would end before the winter."
"""The text whose token depths are drawn."""


@dataclass(frozen=True)
class Result:
    """The outcome of one run, from its metrics.jsonl and its saved settings."""

    name: str
    parameters: int
    """Unique weights."""
    iterations: list[int]
    losses: list[float]
    """Training loss at each iteration, nats a token."""
    teraflops: list[float]
    """Executed training FLOPs up to each iteration, 1e12."""
    validation: dict[int, tuple[float, float]]
    """Iteration -> validation loss by whole-sequence top-k and by causal threshold, nats a token."""
    tokens_per_second: float
    """Median over the iterations."""


def main(argv: list[str] | None = None) -> None:
    """Run all steps. If one fails, the program ends with that step's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="directory for all results")
    parser.add_argument("--sources", nargs="+", help="sources of text (tools/collect_corpus.py); default: all")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="settings for both runs; must come last")
    args = parser.parse_args(argv)
    start = time.perf_counter()

    data_flags = prepare_data(args.output, args.sources)
    step(f"Pretrain {' and '.join(MODELS)} side by side, logs in {args.output}/<model>/train.log")
    pretrain(args.output, data_flags, args.flags)
    step("Compare")
    results = [read_result(name, args.output / name.lower()) for name in MODELS]
    print(table(results))
    plot(results, args.output / "loss.png")
    step("Show the recursions that each token takes")
    picture = args.output / "routing.png"
    run(["tools/show_routing.py", "--model", args.output / "mor", "--text", SENTENCE, "--output", picture])
    print(f"\nLoss curves: {args.output / 'loss.png'}. Token depths: {picture}.")
    print(f"Checkpoints, settings and metrics: {args.output}/<model>.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


def prepare_data(output: Path, sources: list[str] | None) -> list[str | Path]:
    """Make corpus, tokenizer and indexed data under `output` unless they exist; return the flags that name them."""
    corpus, tokenizer, prefix = output / "data/corpus.jsonl", output / "data/tokenizer", output / "data/corpus"
    indexed = Path(f"{prefix}_text_document")
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer.with_suffix(".model")]
    step("Collect text")
    if not corpus.exists():
        run(["tools/collect_corpus.py", "--output", corpus.parent, *(["--sources", *sources] if sources else [])])
    step(f"Train a tokenizer of {VOCABULARY} pieces")
    if not tokenizer.with_suffix(".model").exists():
        size = ["--vocab-size", VOCABULARY, "--model-type", "bpe"]
        run(["tools/train_tokenizer.py", "--input", corpus, *size, "--output-prefix", tokenizer])
    step("Index the text")
    if not indexed.with_suffix(".idx").exists():
        run(["tools/preprocess_data.py", "--input", corpus, "--output-prefix", prefix, *flags, "--append-eod"])
    print(f"{indexed}.bin is ready", flush=True)
    return ["--data-path", indexed, *flags]


def step(title: str) -> None:
    """Announce a step."""
    print(f"\n== {title}", flush=True)


def run(command: list) -> None:
    """Run one of the project's programs.

    Args:
        command: program, relative to the repository, and its arguments.
    Raises:
        SystemExit: the program failed; carries its exit status.
    """
    status = subprocess.run(words(command)).returncode
    if status:
        sys.exit(status)


def pretrain(output: Path, data_flags: list, more_flags: list[str]) -> None:
    """Pretrain the models at the same time, each on its share of the cores: a small model gains little from more.

    Raises:
        SystemExit: a run failed; carries its exit status.
    """
    threads = str(max(1, min(os.cpu_count() or 1, 8) // len(MODELS)))

    def one(name: str) -> int:
        directory = output / name.lower()
        directory.mkdir(parents=True, exist_ok=True)
        configs = ["--config", CONFIGS / f"{MODELS[name]}.yaml", CONFIGS / "quickstart.yaml"]
        command = ["pretrain_mor.py", *configs, *data_flags, "--save", directory, "--load", directory, *more_flags]
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with (
            (directory / "train.log").open("w") as log,
            subprocess.Popen(words(command), env=environment, **streams) as process,
        ):
            for line in process.stdout:
                log.write(line)
                print(f"{name:8}{shorten(line)}", end="", flush=True)
        return process.returncode

    with ThreadPoolExecutor() as pool:
        statuses = list(pool.map(one, MODELS))
    if any(statuses):
        sys.exit(max(statuses, key=abs))


def words(command: list) -> list[str]:
    """The command line that runs a program of the repository with the given arguments."""
    return [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]


def shorten(line: str) -> str:
    """A Megatron log line without the fields that matter less here; any other line unchanged."""
    shown = ("iteration ", "learning rate", "lm loss", "mean depth", "tokens per second")
    time_and_first, *rest = line.rstrip().split(" | ")
    if "consumed samples" not in line:
        return line
    fields = [time_and_first.rpartition("] ")[2].strip(), *(field for field in rest if field.startswith(shown))]
    return " | ".join(" ".join(field.split()) for field in fields) + "\n"


def read_result(name: str, directory: Path) -> Result:
    """Read what the run in `directory` reported."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "lm_loss" in record]
    total, teraflops = 0.0, []
    for record in steps:
        total += record["tflops_per_gpu"] * record["iteration_time_ms"] / 1e3
        teraflops.append(total)
    latest = directory / f"iter_{steps[-1]['iteration']:07d}"
    config = read_config(["--config", str(latest / "config.yaml")])
    config = resolve_vocabulary(config, configured_tokenizer(config.data))
    validation = {
        record["iteration"]: (record["validation_loss_topk"], record["validation_loss_threshold"])
        for record in records
        if "validation_loss_topk" in record
    }
    return Result(
        name,
        count_parameters(config).unique,
        [record["iteration"] for record in steps],
        [record["lm_loss"] for record in steps],
        teraflops,
        validation,
        statistics.median(record["tokens_per_second"] for record in steps),
    )


def table(results: list[Result]) -> str:
    """The results side by side, one property a line."""
    rows = [
        ("", [result.name for result in results]),
        ("unique parameters", [f"{result.parameters:,}" for result in results]),
        ("executed training FLOPs (1e12)", [f"{result.teraflops[-1]:.4g}" for result in results]),
        ("training loss, first iteration", [f"{result.losses[0]:.3f}" for result in results]),
        ("validation loss, top-k", [f"{final_validation(result)[0]:.3f}" for result in results]),
        ("validation loss, threshold (causal)", [f"{final_validation(result)[1]:.3f}" for result in results]),
        ("tokens/s", [f"{result.tokens_per_second:,.0f}" for result in results]),
    ]
    return "\n".join(f"{label:37}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows)


def final_validation(result: Result) -> tuple[float, float]:
    """The last validation losses: top-k, threshold."""
    return result.validation[max(result.validation)]


def plot(results: list[Result], path: Path) -> None:
    """Loss against iterations and against executed FLOPs, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_iteration, by_flops) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for result in results:
        (line,) = by_iteration.plot(
            result.iterations, result.losses, lw=0.8, alpha=0.6, label=f"{result.name}, training"
        )
        points = sorted(result.validation.items())
        losses = [threshold for _, (_, threshold) in points]
        marks = {"color": line.get_color(), "marker": "o", "ls": "--"}
        by_iteration.plot([iteration for iteration, _ in points], losses, label=f"{result.name}, validation", **marks)
        by_flops.plot(result.teraflops, result.losses, lw=0.8, alpha=0.6, color=line.get_color())
        spent = dict(zip(result.iterations, result.teraflops, strict=True))
        by_flops.plot([spent[iteration] for iteration, _ in points], losses, **marks)
    by_iteration.set(xlabel="iteration", ylabel="loss (nats a token)")
    by_flops.set(xlabel="executed training FLOPs (1e12)")
    by_iteration.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
