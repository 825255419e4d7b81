"""The cost of checkpoints: stall of the run, speed compared with plain writing, checksums; start-up far into a corpus.

    python benchmarks/checkpoint.py --rounds 5 --output checkpoint.json

One process, fp32, Adam: 12 bytes per parameter. Every round measures each kind of save once, so a drift of the disk's
speed affects all of them; medians and ranges are over rounds.

- plain: the same number of bytes, from memory, in one file, flushed to the disk;
- sync: a whole save, from the call until `latest` points to it;
- async: how long training waits, in the call and in the next optimizer step, while an iteration runs; and how long the
  checkpoint takes, including that iteration;
- checksum: XXH3 over the same bytes in memory, as the save computes it.

Start-up: building the datasets and reading the first micro-batch at consumed samples 0 and 10^9, with a corpus of
100,000 documents and an empty index cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from processor import processor

from mor_megatron.checkpointing.engine_state import local_entries
from mor_megatron.checkpointing.save import Saver
from mor_megatron.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    RecursionConfig,
    TrainingConfig,
)
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.files import flush
from mor_megatron.model.mor_model import build_model
from mor_megatron.pretraining.batches import build_data
from mor_megatron.training.engine import Engine, build_engine
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import train_step

VOCABULARY, SEQ_LENGTH = 8192, 256
FAR = 10**9
CHUNK = 1 << 22


def build(args: argparse.Namespace, directory: str) -> tuple[Engine, Config]:
    """An engine whose optimizer has state, and its configuration."""
    config = validate(
        Config(
            model=ModelConfig(
                num_layers=2 + 3 * args.block_layers,
                hidden_size=args.hidden_size,
                ffn_hidden_size=3 * args.hidden_size,
                num_attention_heads=args.hidden_size // 64,
                vocab_size=VOCABULARY,
            ),
            recursion=RecursionConfig(num_recursions=3, routing="expert_choice"),
            data=DataConfig(seq_length=SEQ_LENGTH),
            training=TrainingConfig(micro_batch_size=1, zero_stage=1),
            checkpoint=CheckpointConfig(save=directory),
        )
    )
    initialize_distributed(config)
    engine = build_engine(build_model(config), config)
    engine.module.train()
    iterate(engine, config)
    return engine, config


def iterate(engine: Engine, config: Config) -> None:
    """One iteration of training on random tokens."""
    tokens = torch.randint(0, VOCABULARY, (1, SEQ_LENGTH))
    train_step(engine, iter([Batch(tokens, tokens.roll(-1, dims=1))]), config, 1, 1e-6)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_plainly(path: Path, chunks: list[memoryview]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        flush(file)


def hash_all(chunks: list[memoryview]) -> None:
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)


def measure_saving(args: argparse.Namespace) -> dict:
    """Seconds for each kind of save, one list over rounds, and the number of bytes saved."""
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        engine, config = build(args, directory)
        entries = [memoryview(entry.numpy()).cast("B") for _, entry in local_entries(engine)]
        chunks = [entry[at : at + CHUNK] for entry in entries for at in range(0, len(entry), CHUNK)]
        background = replace(config, checkpoint=replace(config.checkpoint, async_save=True))
        savers = Saver(engine, config), Saver(engine, background)
        times: dict[str, list[float]] = {
            name: [] for name in ("plain", "sync", "async stall", "async", "iteration", "checksum")
        }
        for number in range(args.rounds + 1):
            os.sync()
            round_times = {"plain": timed(lambda: write_plainly(Path(directory) / "plain", chunks))}
            (Path(directory) / "plain").unlink()
            os.sync()
            round_times["sync"] = timed(lambda: savers[0].save(Progress(iteration=1)))
            shutil.rmtree(Path(directory) / "iter_0000001")
            os.sync()
            before, start = savers[1].stalled, time.perf_counter()
            savers[1].save(Progress(iteration=2))
            iterate(engine, config)
            round_times["async stall"] = savers[1].stalled - before
            savers[1].finish()
            round_times["async"] = time.perf_counter() - start
            round_times["iteration"] = timed(lambda: iterate(engine, config))
            shutil.rmtree(Path(directory) / "iter_0000002")
            round_times["checksum"] = timed(lambda: hash_all(chunks))
            if number > 0:  # the first round allocates the buffers that later rounds reuse
                for name, seconds in round_times.items():
                    times[name].append(seconds)
    return {"bytes": sum(map(len, entries)), "seconds": times}


def startup_config(prefix: str, cache: str) -> Config:
    """The configuration of a run longer than 10^9 samples."""
    return validate(
        Config(
            model=ModelConfig(vocab_size=VOCABULARY),
            data=DataConfig(data_path=(prefix,), split="1,0,0", seq_length=1024, data_cache_path=cache),
            training=TrainingConfig(micro_batch_size=8, global_batch_size=8, train_iters=FAR // 4, eval_iters=0),
        )
    )


def first_batch(config: Config, consumed: int) -> Batch:
    progress = Progress(iteration=consumed // config.training.global_batch_size, consumed_samples=consumed)
    return next(build_data(config, None).training(progress))


def measure_startup(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to the first micro-batch at either sample, one list over rounds."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        prefix = f"{directory}/corpus"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        generator = np.random.default_rng(0)
        for length in generator.integers(100, 900, 100_000):
            builder.add_document(torch.zeros(int(length), dtype=torch.int16), [int(length)])
        builder.finalize(f"{prefix}.idx")
        times: dict[str, list[float]] = {"at 0": [], "at 10^9": []}
        for number in range(args.rounds + 1):
            for name, consumed in (("at 0", 0), ("at 10^9", FAR)):
                config = startup_config(prefix, f"{directory}/{number}-{consumed}")
                initialize_distributed(config)
                seconds = timed(partial(first_batch, config, consumed))
                if number > 0:  # the first round reads the corpus from the disk
                    times[name].append(seconds)
    return times


def row(name: str, seconds: list[float], note: str = "") -> str:
    return f"{name:14} {statistics.median(seconds):8.3f} s  ({min(seconds):.3f} - {max(seconds):.3f})  {note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--block-layers", type=int, default=4, help="layers of the shared block")
    parser.add_argument("--directory", help="directory to write to (default: the temporary directory)")
    parser.add_argument("--output", help="JSON file for the numbers")
    args = parser.parse_args()

    startup = measure_startup(args)
    saving = measure_saving(args)
    size, seconds = saving["bytes"], saving["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    where = f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{where}; {size / 1e6:,.0f} MB, {args.rounds} interleaved rounds: median (range)")
    for name in ("plain", "sync", "async"):
        print(row(name, seconds[name], f"{size / medians[name] / 1e6:,.0f} MB/s"))
    print(row("async stall", seconds["async stall"], f"{medians['async stall'] / medians['sync']:.1%} of sync"))
    print(row("iteration", seconds["iteration"], f"of {SEQ_LENGTH} tokens"))
    print(row("checksum", seconds["checksum"], f"{medians['checksum'] / medians['sync']:.1%} of sync"))
    for name, values in startup.items():
        print(row(f"start {name}", values))
    if args.output:
        Path(args.output).write_text(json.dumps({"machine": where, **saving, "startup": startup}, indent=1) + "\n")


if __name__ == "__main__":
    main()
