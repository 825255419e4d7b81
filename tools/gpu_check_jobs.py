"""The jobs of `gpu_check.py`: one per process, alone or as one rank of a layout; rank 0 writes the rows.

    python tools/gpu_check_jobs.py JOB ROWS.json '{"argument": value, ...}'

The caller decides which device a job computes on: with `CUDA_VISIBLE_DEVICES=` it is the CPU.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import sys
import time
import warnings
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "distributed"), str(ROOT / "tests")]

from gpu_check import OUT_OF_MEMORY  # noqa: E402
from layout_runs import FP32_LAYOUT_TOL, differences, train  # noqa: E402
from table import LAYOUTS, ONE, build_config  # noqa: E402

from mor_megatron.config.cli import read_config  # noqa: E402
from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig, TrainingConfig  # noqa: E402
from mor_megatron.config.validate import validate  # noqa: E402
from mor_megatron.data.batch import Batch  # noqa: E402
from mor_megatron.distributed.cpu import device  # noqa: E402
from mor_megatron.distributed.initialize import initialize_distributed  # noqa: E402
from mor_megatron.distributed.launch import launched_world_size  # noqa: E402
from mor_megatron.model import build_model  # noqa: E402
from mor_megatron.pretraining.capabilities import capability_line  # noqa: E402
from mor_megatron.pretraining.peak import device_peak  # noqa: E402
from mor_megatron.training.engine import build_engine  # noqa: E402
from mor_megatron.training.metrics import training_record  # noqa: E402
from mor_megatron.training.progress import Progress  # noqa: E402
from mor_megatron.training.train_step import train_step  # noqa: E402

Row = dict[str, object]

CUDA_LAYOUT_TOL = 1e-4
"""Like `FP32_LAYOUT_TOL`, but between a GPU and a CPU: each GPU kernel sums in its own order."""
KERNEL_TOL = 0.05
"""Relative difference of all gradients in bf16 from those in fp32. On a CPU it is 0.007 to 0.008, including tokens near
the boundary that are routed differently. Without the causal mask it would be 0.7, with keys shifted by one 0.4."""

IMPLEMENTATIONS = [
    ("local", "sdpa"),
    ("local", "flash"),
    ("transformer_engine", "sdpa"),
    ("transformer_engine", "flash"),
]
KERNEL_MODELS = {
    "expert": {"num_recursions": 3, "routing": "expert_choice"},
    "expert sharing": {"num_recursions": 3, "routing": "expert_choice", "kv_mode": "sharing"},
    "token": {"num_recursions": 3, "routing": "token_choice"},
}
CURVE_MODELS = {"vanilla": {}, "expert": KERNEL_MODELS["expert"]}
CURVE_VOCABULARY = 128


def single(models: list[str], results: str, global_batches: list[int]) -> list[Row]:
    """Train the small models of `tests/distributed` in one process, and write the outcome to `results`."""
    for global_batch in global_batches:
        for model in models:
            got = train(build_config(model, replace(ONE, global_batch=global_batch)))
            _result_of(results, model, global_batch).write_bytes(pickle.dumps(got))
    return []


def layout(name: str, models: list[str], results: str) -> list[Row]:
    """Train the small models in one layout, and compare them with one process."""
    layout = next(layout for layout in (ONE, *LAYOUTS) if layout.name == name)
    tolerance = CUDA_LAYOUT_TOL if torch.cuda.is_available() else FP32_LAYOUT_TOL
    rows = []
    for model in models:
        got = train(build_config(model, layout))
        if dist.get_rank() == 0:
            expected = pickle.loads(_result_of(results, model, layout.global_batch).read_bytes())
            found = differences(got, expected, tolerance=-1.0)  # all of them
            what, error = max(found, key=lambda difference: difference[1])
            rows.append(
                {"layout": name, "model": model, "loss": got.reports[-1].lm_loss, "largest difference": error}
                | {"of": what, "limit": tolerance, "failed": not error <= tolerance}
            )
    return rows


def _result_of(results: str, model: str, global_batch: int) -> Path:
    return Path(results) / f"{model}-{global_batch}.pickle"


def kernels() -> list[Row]:
    """Compare bf16 gradients of small models under each available implementation of layers and attention.

    The reference is fp32, with Megatron-core's layers and PyTorch's attention.
    """
    rows = []
    for model, recursion in KERNEL_MODELS.items():
        expected = _gradients(_small_config(recursion, "local", "sdpa", bf16=False))
        for implementation, attention in IMPLEMENTATIONS:
            row: Row = {"model": model, "layers": implementation, "attention": attention}
            try:
                gradients = _gradients(_small_config(recursion, implementation, attention))
            except ValueError as error:
                rows.append(row | {"skipped": str(error).split(": use")[0]})
                continue
            error = ((gradients - expected).norm() / expected.norm()).item()
            rows.append(row | {"difference": error, "limit": KERNEL_TOL, "failed": not error <= KERNEL_TOL})
    return rows


def curves(iterations: int) -> list[Row]:
    """Losses of small models that learn a predictable sequence, in bf16."""
    rows = []
    for model, recursion in CURVE_MODELS.items():
        config = _small_config(recursion, "auto", "auto")
        initialize_distributed(config)
        engine = build_engine(build_model(config), config)
        engine.module.train()
        losses = [
            train_step(engine, iter([_walk(config, step)]), config, step, lr=3e-3 * min(1.0, step / 10)).lm_loss
            for step in range(1, iterations + 1)
        ]
        rows.append({"model": model, "device": device().type, "losses": losses})
    return rows


def throughput(settings: list[str], size: str, model: str, iterations: int) -> list[Row]:
    """Time of training steps on random tokens.

    Args:
        settings: arguments of `pretrain_mor.py`.
        iterations: timed iterations, after two for warm-up.
    """
    world = launched_world_size() or 1
    config = validate(read_config(settings), world)
    initialize_distributed(config)
    vocabulary = config.model.vocab_size
    engine = build_engine(build_model(config), config)
    engine.module.train()
    peak, _ = device_peak(config)
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    batches = cycle([Batch(tokens, tokens.roll(-1, dims=1))])
    records = []
    for step in range(1, 3 + iterations):
        start = time.perf_counter()
        report = train_step(engine, batches, config, step, lr=1e-5)  # its report waits for the device
        timing = {"lr": 1e-5, "seconds": time.perf_counter() - start, "ranks": world, "peak_tflops": peak}
        records.append(training_record(config, Progress(), report, **timing))
    timed = records[2:]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    measured = ("tokens_per_second", "tflops_per_gpu", "utilisation")
    return [
        {"size": size, "model": model, "micro-batch": config.training.micro_batch_size}
        | {name: statistics.median(record[name] for record in timed) for name in measured}
        | {"peak_tflops": peak, "gib": memory, "ranks": world, "loss": timed[-1]["lm_loss"]}
        | {"failed": timed[-1]["lm_loss"] is None, "using": capability_line(config)}
    ]


def _small_config(recursion: Row, implementation: str, attention: str, bf16: bool = True) -> Config:
    """Heads of width 64, which suit flash-attn; one micro-batch per iteration."""
    return validate(
        Config(
            model=ModelConfig(
                num_layers=8,
                hidden_size=128,
                ffn_hidden_size=256,
                num_attention_heads=2,
                max_position_embeddings=128,
                vocab_size=CURVE_VOCABULARY,
            ),
            recursion=RecursionConfig(**recursion),
            data=DataConfig(seq_length=128),
            training=TrainingConfig(
                micro_batch_size=8, bf16=bf16, transformer_impl=implementation, attention_backend=attention
            ),
        )
    )


def _walk(config: Config, step: int) -> Batch:
    """A random walk through the vocabulary: the next token is one of four."""
    generator = torch.Generator().manual_seed(step)
    rows, length = config.training.micro_batch_size, config.data.seq_length
    jumps = torch.randint(1, 5, (rows, length + 1), generator=generator)
    tokens = jumps.cumsum(1) % CURVE_VOCABULARY
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _gradients(config: Config) -> Tensor:
    """All gradients of one batch in one fp32 vector; weights are the same for every implementation."""
    initialize_distributed(config)
    model = build_model(config)
    model(_walk(config, 1).to(device())).mean().backward()
    return torch.cat([p.grad.float().view(-1) for _, p in sorted(model.named_parameters())]).cpu()


JOBS = {job.__name__: job for job in (single, layout, kernels, curves, throughput)}


def main() -> int:
    """Run the job that the command line names."""
    job, output, arguments = sys.argv[1:]
    warnings.filterwarnings("ignore")
    try:
        rows = JOBS[job](**json.loads(arguments))
    except torch.OutOfMemoryError:
        Path(output).with_suffix(OUT_OF_MEMORY).touch()
        os._exit(1)  # at once, so that the launcher ends the ranks that wait for this one
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
