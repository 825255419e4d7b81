"""Time and memory of one training step: our models through the DeepSpeed engine, and Hugging Face's Llama.

All models are built first and then take turns, one step each per round, so a drift of the machine's speed affects all
of them; medians over rounds are compared. Every model sees the same tokens and uses torch's fused AdamW.

    python benchmarks/train_step.py --rounds 7 --threads 2 --dtype fp32 bf16 --output train_step.json

On a machine that does other work as well, `--threads 1 --clock cpu` measures the CPU time of the process.

Executed FLOPs are those of `mor_megatron.planning.accounting` (causal pairs once, head included), for the tokens as
they were routed. Peak memory is measured in one new process per model (`--no-memory` skips it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from footprint import resident_peak
from processor import processor

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.accounting import executed_flops_per_token
from mor_megatron.pretraining.peak import measure_gemm
from mor_megatron.recursion import context as names
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import train_step

HF = "hf_llama"
MODELS = {
    "vanilla": {},
    "recursive_nr3": {"num_recursions": 3},
    "recursive_nr3_lora64": {"num_recursions": 3, "relaxation": "lora", "lora_rank": 64},
    "expert_nr2": {"num_recursions": 2, "routing": "expert_choice"},
    "expert_nr3": {"num_recursions": 3, "routing": "expert_choice"},
    "expert_nr4": {"num_recursions": 4, "routing": "expert_choice"},
    "expert_nr3_sharing": {"num_recursions": 3, "routing": "expert_choice", "kv_mode": "sharing"},
    # Loss-free balancing has a bias, which can make the depths of untrained weights equally frequent.
    "token_nr3": {"num_recursions": 3, "routing": "token_choice", "router_balance": "loss_free"},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEARNING_RATE = 1e-6  # small: the routing that was balanced at the start must stay balanced


class OurStep:
    """A model of this project through its real engine and train_step."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: str):
        recursion = {**MODELS[name]}
        # 12 shared layers divide by 2, 3 and 4.
        self.config = validate(
            Config(
                model=ModelConfig(
                    num_layers=args.num_layers,
                    hidden_size=args.hidden_size,
                    ffn_hidden_size=args.ffn_hidden_size,
                    num_attention_heads=args.hidden_size // 64,
                    max_position_embeddings=args.seq_length,
                    vocab_size=args.vocab_size,
                ),
                recursion=RecursionConfig(**recursion),
                data=DataConfig(seq_length=args.seq_length),
                training=TrainingConfig(
                    micro_batch_size=args.batch_size, bf16=dtype == "bf16", zero_stage=0 if dtype == "fp32" else 1
                ),
            )
        )
        self.batch = Batch(args.tokens, args.tokens.roll(-1, dims=1))
        model = build_model(self.config)
        if recursion.get("routing") == "token_choice":
            _balance_depths(model, self.batch)
        self.engine = build_engine(model, self.config)
        self.fractions = None

    def __call__(self) -> None:
        report = train_step(self.engine, iter([self.batch]), self.config, iteration=1, lr=LEARNING_RATE)
        if self.config.recursion.routing != "none":
            count = self.config.recursion.num_recursions
            self.fractions = [report.routing[names.TOKENS_PER_RECURSION.format(r)] for r in range(count)]

    def flops(self) -> float:
        """FLOPs executed in one step, forward and backward."""
        return 3.0 * executed_flops_per_token(self.config, self.fractions) * self.batch.tokens.numel()


class HuggingFaceStep:
    """LlamaForCausalLM of the vanilla size: SDPA attention, the same optimizer."""

    def __init__(self, args: argparse.Namespace, dtype: str):
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = args.hidden_size // 64
        config = LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.ffn_hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=args.seq_length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.tokens = args.tokens

    def __call__(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _balance_depths(model, batch: Batch) -> None:
    """Set the loss-free bias so that the tokens of this batch choose all depths equally often."""
    context = RoutingContext(trace={})
    with torch.no_grad():
        model(Batch(batch.tokens), context)
    scores = torch.softmax(context.trace["router_logits"], dim=-1).flatten(0, 1)  # [S*B, Nr]
    bias = model.router.balance_bias
    for step in range(400):
        depth = (scores + bias).argmax(-1)
        fractions = torch.bincount(depth, minlength=len(bias)).float() / depth.numel()
        bias -= 0.2 * 0.985**step * (fractions - fractions.mean())


def make_step(name: str, args: argparse.Namespace, dtype: str):
    """A callable that runs one training step of the named model."""
    return HuggingFaceStep(args, dtype) if name == HF else OurStep(name, args, dtype)


def time_models(chosen: list[str], args: argparse.Namespace, dtype: str) -> list[dict]:
    """Rows of the table for one dtype; ratios are medians of per-round ratios."""
    steps = {name: make_step(name, args, dtype) for name in chosen}
    seconds = {name: [] for name in chosen}
    for round_number in range(1 + args.rounds):
        for name, step in steps.items():
            start = CLOCKS[args.clock]()
            step()
            if round_number > 0:  # the first warms up
                seconds[name].append(CLOCKS[args.clock]() - start)
    peak = measure_gemm(1024, torch.bfloat16 if dtype == "bf16" else torch.float32, rounds=20)
    tokens = args.tokens.numel()
    vanilla_flops = steps["vanilla"].flops()
    rows = []
    for name in chosen:
        flops = vanilla_flops if name == HF else steps[name].flops()
        median = statistics.median(seconds[name])
        to = {other: _ratio(seconds[name], seconds[other]) for other in (HF, "vanilla") if other in chosen}
        rows.append(
            {
                "dtype": dtype,
                "model": name,
                "seconds": median,
                "spread": (max(seconds[name]) - min(seconds[name])) / median,
                "tokens_per_second": tokens / median,
                "gflop": flops / 1e9,
                "share_of_peak": flops / median / 1e12 / peak,
                "peak_gflops": 1e3 * peak,
                "time_to_hf": to.get(HF),
                "time_to_vanilla": to["vanilla"],
                "flops_to_vanilla": flops / vanilla_flops,
            }
        )
    return rows


def _ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def measure_memory(name: str, args: argparse.Namespace, dtype: str) -> None:
    """In a new process: print the peak resident memory of two steps above that of the imports, in bytes."""
    before = resident_peak()
    step = make_step(name, args, dtype)
    for _ in range(2):
        step()
    print(f"PEAK {resident_peak() - before}")


def peak_memory(name: str, dtype: str) -> int:
    """Peak bytes of one model, from a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split("PEAK ")[1])


def print_table(rows: list[dict]) -> None:
    """A table with one line per model."""
    print(
        f"{'dtype':5} {'model':20} {'s/step':>7} {'spread':>6} {'tokens/s':>8} {'GFLOP':>6} {'of peak':>7} "
        f"{'t/HF':>5} {'t/van':>5} {'F/van':>5} {'t/F':>5} {'MiB':>6} {'M/van':>5}"
    )
    for row in rows:
        hf = "" if row["time_to_hf"] is None else f"{row['time_to_hf']:.2f}"
        memory, relative = "", ""
        if "peak_bytes" in row:
            memory, relative = f"{row['peak_bytes'] / 2**20:.0f}", f"{row['memory_to_vanilla']:.2f}"
        print(
            f"{row['dtype']:5} {row['model']:20} {row['seconds']:7.3f} {row['spread']:6.0%} "
            f"{row['tokens_per_second']:8.0f} {row['gflop']:6.0f} {row['share_of_peak']:7.0%} {hf:>5} "
            f"{row['time_to_vanilla']:5.2f} {row['flops_to_vanilla']:5.2f} "
            f"{row['time_to_vanilla'] / row['flops_to_vanilla']:5.2f} "
            f"{memory:>6} {relative:>5}"
        )


def machine(args: argparse.Namespace) -> str:
    """Processor, threads and versions, for the head of the table."""
    import deepspeed
    import megatron.core
    import transformers

    return (
        f"{processor()}, {args.threads} threads, torch {torch.__version__}, megatron-core {megatron.core.__version__}, "
        f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}; hidden {args.hidden_size}, "
        f"ffn {args.ffn_hidden_size}, {args.num_layers} layers, sequence {args.seq_length}, batch {args.batch_size}, "
        f"vocabulary {args.vocab_size}, {args.rounds} interleaved rounds, medians of {args.clock} time"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line, with the tokens of the one batch added."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[HF, *MODELS], default=[HF, *MODELS])
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ffn-hidden-size", type=int, default=1408)
    parser.add_argument("--num-layers", type=int, default=14)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if "vanilla" not in args.models:
        parser.error("--models needs vanilla, to which the others are compared")
    generator = torch.Generator().manual_seed(0)
    args.tokens = torch.randint(0, args.vocab_size, (args.batch_size, args.seq_length), generator=generator)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    initialize_distributed(Config())
    if args.memory_of:
        measure_memory(*args.memory_of[:1], args, args.memory_of[1])
        return
    print(machine(args), flush=True)
    rows = []
    for dtype in args.dtype:
        new = time_models(args.models, args, dtype)
        if not args.no_memory:
            for row in new:
                row["peak_bytes"] = peak_memory(row["model"], dtype)
            vanilla = next(row["peak_bytes"] for row in new if row["model"] == "vanilla")
            for row in new:
                row["memory_to_vanilla"] = row["peak_bytes"] / vanilla
        rows += new
    print_table(rows)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
