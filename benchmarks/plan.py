"""What the planner predicts, compared with real iterations: memory at the peak of each rank, and CPU time.

    python benchmarks/plan.py --json plan.json
    python benchmarks/plan.py --only time

Memory are live tensors (`live_bytes.py`), in the second of two iterations; every line starts its own processes (gloo,
one thread each). The presets run at their real size, in one process, with micro-batches of one sequence. Buckets of
DeepSpeed are smaller than in a run, so that they do not hide the rest.

Time is the CPU time of a rank's process, which waiting for others does not add to, against the predicted time of
computation and update; the machine is calibrated first.
"""

from __future__ import annotations

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from live_bytes import LiveBytes
from megatron.core import parallel_state
from parallel_jobs import run_ranks
from processor import processor
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.huggingface.teacher import load_teacher
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.machines import load_machine
from mor_megatron.planning.memory import rank_memory
from mor_megatron.planning.search import Evaluation
from mor_megatron.planning.stages import pipeline_plan
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import num_microbatches, train_step

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
SHAPE = (
    "--num-layers 14 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 --group-query-attention "
    "--num-query-groups 2 --vocab-size 4096 --seq-length 256 --micro-batch-size 2 --global-batch-size 8"
)
EXPERT = "--num-recursions 3 --routing expert_choice"
TAUGHT = f"{EXPERT} --distill-from TEACHER"
"""By a dense model of the same depth and width, in a directory beside the bucket file."""
LAYOUTS = {
    "1 process, fp32": (1, "--zero-stage 0"),
    "dp2, ZeRO 1, expert-choice": (2, f"--bf16 --zero-stage 1 {EXPERT}"),
    "dp2, ZeRO 2, expert-choice": (2, f"--bf16 --zero-stage 2 {EXPERT}"),
    "dp2, ZeRO 3, expert-choice": (2, f"--bf16 --zero-stage 3 {EXPERT}"),
    "dp2, ZeRO 1, fp32, layers recomputed": (2, "--zero-stage 1 --recompute-granularity full"),
    "tp2, expert-choice": (2, f"--bf16 --tensor-model-parallel-size 2 {EXPERT}"),
    "tp2, SP, KV sharing": (2, f"--bf16 --tensor-model-parallel-size 2 --sequence-parallel --kv-mode sharing {EXPERT}"),
    "pp2 ring, expert-choice": (2, f"--bf16 --pipeline-model-parallel-size 2 {EXPERT}"),
    "pp2, vanilla, fp32": (2, "--zero-stage 0 --pipeline-model-parallel-size 2"),
    "pp4 ring, recursions recomputed": (
        4,
        f"--bf16 --pipeline-model-parallel-size 4 {EXPERT} --recompute-granularity full --recompute-unit recursion",
    ),
    "tp2, SP, pp2 ring, token-choice": (
        4,
        "--bf16 --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --num-recursions 3 "
        "--routing token_choice",
    ),
    "1 process, fp32, expert-choice, teacher": (1, f"--zero-stage 0 {TAUGHT}"),
    "tp2, SP, expert-choice, teacher": (2, f"--bf16 --tensor-model-parallel-size 2 --sequence-parallel {TAUGHT}"),
    "pp2 ring, expert-choice, teacher": (2, f"--bf16 --pipeline-model-parallel-size 2 {TAUGHT}"),
}
PRESETS = {
    f"{size}, {name}": (1, f"--config {CONFIGS / file} {CONFIGS / size.lower()}.yaml --micro-batch-size 1 {batch}")
    for size in ("135M", "360M")
    for name, file in (("vanilla", "vanilla.yaml"), ("expert-choice Nr=3", "mor_expert_nr3.yaml"))
    for batch in ["--global-batch-size 1"]
}
TIMED = {
    "1 process, fp32": (1, "--zero-stage 0"),
    "1 process, expert-choice": (1, f"--zero-stage 0 {EXPERT}"),
    "1 process, layers recomputed": (1, "--zero-stage 0 --recompute-granularity full"),
    "pp2 ring, expert-choice": (2, f"--zero-stage 0 --pipeline-model-parallel-size 2 {EXPERT}"),
    "1 process, expert-choice, teacher": (1, f"--zero-stage 0 {TAUGHT}"),
    "pp2 ring, expert-choice, teacher": (2, f"--zero-stage 0 --pipeline-model-parallel-size 2 {TAUGHT}"),
}
BUCKET = 2_000_000
MIB = 2**20


def measure(config: Config, iterations: int = 2, weigh: bool = True) -> dict:
    """Of one rank: bytes at the peak of the last iteration, and the least CPU seconds of one after the first."""
    torch.set_num_threads(1)
    initialize_distributed(config)
    with LiveBytes() if weigh else torch.enable_grad() as live:
        model = build_model(config)
        model.distillation = load_teacher(model, config)
        engine = build_engine(model, config)
        engine.module.train()
        seconds = []
        for iteration in range(1, 1 + iterations):
            if weigh:
                live.reset_peak()
            start = time.process_time()
            train_step(engine, _batches(config), config, iteration, 1e-3)
            seconds.append(time.process_time() - start)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {"stage": stage, "peak": live.peak if weigh else 0, "seconds": min(seconds[1:])}


def _batches(config: Config) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    shape = (config.training.micro_batch_size, config.data.seq_length)
    for _ in range(num_microbatches(config)):
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        yield Batch(tokens, tokens.roll(-1, dims=1))


def build_config(ranks: int, flags: str, bucket_file: Path) -> Config:
    """The validated run of a line."""
    flags = flags.replace("TEACHER", str(bucket_file.with_name("teacher")))
    words = flags.split() if "--config" in flags else f"{SHAPE} {flags}".split()
    return validate(read_config([*words, "--deepspeed-config", str(bucket_file)]), ranks)


def save_teacher(path: Path) -> None:
    """The model of `TAUGHT`: that of `SHAPE`, of random weights."""
    shape = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=14, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(path)


def memory_row(name: str, config: Config, ranks: int) -> dict:
    """Predicted and measured peak of the rank on which they differ most."""
    pipeline, rows = pipeline_plan(config, teacher_settings(config)), []
    for report in run_ranks(ranks, measure, config):
        planned = rank_memory(config, pipeline, report["stage"], ranks, cuda=False)
        rows.append(
            {
                "layout": name,
                "state": planned.state.total,
                "predicted": planned.total,
                "measured": report["peak"],
                "ratio": planned.total / report["peak"],
                "moment": planned.peak.name,
            }
        )
    return max(rows, key=lambda row: abs(row["ratio"] - 1))


def time_row(name: str, config: Config, ranks: int, machine_file: Path) -> dict:
    """Predicted seconds of computation and update, and the CPU seconds of the slowest rank."""
    predicted = Evaluation(ranks, load_machine(str(machine_file)), teacher_settings(config))(config).time
    seconds = max(report["seconds"] for report in run_ranks(ranks, measure, config, 4, False))
    expected = predicted.compute + predicted.update
    return {"layout": name, "predicted": expected, "measured": seconds, "ratio": expected / seconds}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("layouts", "presets", "time"), help="these tables")
    parser.add_argument("--json", type=Path, help="JSON file for all measurements")
    args = parser.parse_args()
    wanted = args.only or ["layouts", "presets", "time"]
    results: dict[str, list[dict]] = {}
    print(f"{processor()}, 1 thread a process, gloo, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        bucket_file, machine_file = Path(directory) / "bucket.json", Path(directory) / "machine.yaml"
        bucket_file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
        save_teacher(bucket_file.with_name("teacher"))
        for table, lines in (("layouts", LAYOUTS), ("presets", PRESETS)):
            if table not in wanted:
                continue
            print("\n| layout | state, MiB | predicted peak | measured | predicted / measured | at |", flush=True)
            print("|---|---|---|---|---|---|", flush=True)
            for name, (ranks, flags) in lines.items():
                row = memory_row(name, build_config(ranks, flags, bucket_file), ranks)
                results.setdefault(table, []).append(row)
                sizes = " | ".join(f"{row[key] / MIB:.1f}" for key in ("state", "predicted", "measured"))
                print(f"| {name} | {sizes} | {row['ratio']:.3f} | {row['moment']} |", flush=True)
        if "time" in wanted:
            from mor_megatron.pretraining.calibration import calibrate

            torch.set_num_threads(1)
            calibrate(machine_file)
            print("\n| layout | predicted, CPU s | measured | predicted / measured |\n|---|---|---|---|", flush=True)
            for name, (ranks, flags) in TIMED.items():
                row = time_row(name, build_config(ranks, flags, bucket_file), ranks, machine_file)
                results.setdefault("time", []).append(row)
                print(f"| {name} | {row['predicted']:.2f} | {row['measured']:.2f} | {row['ratio']:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
