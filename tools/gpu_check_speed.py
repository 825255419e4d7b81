"""The stages of `gpu_check.py` that measure time: ceilings, waits, training steps, kernels, generation."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.planning.accounting import executed_flops_per_token, measured_fractions
from mor_megatron.pretraining.capabilities import capability_line
from mor_megatron.pretraining.peak import device_peak
from mor_megatron.training.cuda_graph import EAGER_STEPS
from mor_megatron.training.engine import Engine, build_engine
from mor_megatron.training.train_step import train_step

if TYPE_CHECKING:
    from gpu_check import Row, Run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
MICRO_BATCHES = 8
"""Of an iteration, as the 1,024 sequences of the paper's recipe on eight GPUs have at 16 a micro-batch."""


def seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(1 + rounds):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait() -> None:
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(run: Run) -> Iterator[Row]:
    """What this device can do: bytes copied (read and written), and bf16 products of random numbers."""
    initialize_distributed(Config())
    size = 2**24 if run.small else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    rate = 2 * size / seconds(lambda: target.copy_(source)) / 1e9
    yield {"what": f"copy of {size >> 20} MiB", "GB/s": rate}
    dtype = torch.float32 if run.small else torch.bfloat16
    shapes = [(512, 512, 512)] if run.small else [(8192, 8192, 8192), (16384, 2048, 16384), (16384, 8192, 2048)]
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device(), dtype=dtype), torch.randn(k, n, device=device(), dtype=dtype)
        yield {"what": f"product {m} x {k} x {n}", "TFLOP/s": 2 * m * k * n / seconds(lambda a=a, b=b: a @ b) / 1e12}
    line = capability_line(validate(read_config(["--config", str(CONFIGS / "1.7b.yaml"), "--micro-batch-size", "4"])))
    yield {"what": line.removeprefix("using ")}


def settings(run: Run, size: str, variant: str, micro_batch: int) -> Config:
    """The configuration of a timed run: presets of `examples/configs` and perhaps flags, bf16."""
    preset, *flags = variant.split()
    presets = ["--config", str(CONFIGS / f"{size}.yaml"), str(CONFIGS / f"{preset}.yaml"), *flags]
    words = [*presets, "--micro-batch-size", str(micro_batch)]
    words += ["--global-batch-size", str(micro_batch * (1 if run.small else MICRO_BATCHES))]
    words += ["--no-bf16", "--vocab-size", "512", "--seq-length", "64"] if run.small else ["--bf16"]
    return validate(read_config(words))


def engine_of(config: Config) -> Engine:
    """A model with random weights, drawn where it computes: on the CPU, 1.7B would take a quarter of a minute."""
    initialize_distributed(config)
    model = MoRModel(config).to(device())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=config.model.init_method_std)
    engine = build_engine(model, config)
    engine.module.train()
    return engine


def random_batches(config: Config) -> Iterator[Batch]:
    """The same random tokens for ever."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return cycle([Batch(tokens, tokens.roll(-1, dims=1)).to(device())])


def large(run: Run) -> Iterator[Row]:
    """1.7B: vanilla, and expert-choice with two and three recursions."""
    variants = ("vanilla", "mor_expert_nr2", "mor_expert_nr3")
    return training(run, "1.7b", variants, micro_batch=8)


def medium(run: Run) -> Iterator[Row]:
    """360M: shared keys and ragged rows, against vanilla; where shapes stand still, as CUDA graphs."""
    graphs = [f"{name} --enable-cuda-graph" for name in ("vanilla", "mor_expert_nr3", "mor_expert_nr3_kv_sharing")]
    return training(run, "360m", (*graphs, "vanilla", "mor_token_nr3"), micro_batch=16)


def tiny(run: Run) -> Iterator[Row]:
    """135M, where launches weigh most."""
    return training(run, "135m", ("vanilla", "mor_expert_nr3"), micro_batch=16)


def training(run: Run, size: str, variants: tuple[str, ...], micro_batch: int) -> Iterator[Row]:
    """A row for each variant; ratios are to the last vanilla one before it."""
    if run.small:
        size, variants, micro_batch = "tiny", ("vanilla", "mor_expert_nr2"), 2
    base: tuple[float, float] | None = None
    for variant in variants:
        if run.left() < 10.0 and not run.small:
            yield {"size": size, "model": variant, "skipped": f"{run.left():.0f} s left"}
            continue
        row, flops = None, 0.0
        while row is None:
            try:
                row, flops = timed_steps(run, size, variant, micro_batch)
            except torch.OutOfMemoryError:
                micro_batch //= 2  # and the ratios to the first are no longer those of equal shapes
                base = None
                if not micro_batch:
                    yield {"size": size, "model": variant, "skipped": "does not fit, one sequence at a time"}
                    return
            release()
        time_per_token = 1.0 / row["tokens/s"]
        if base is None or variant.startswith("vanilla"):  # eager steps are compared with eager ones
            base = time_per_token, flops
        time_ratio, flops_ratio = time_per_token / base[0], flops / base[1]
        yield row | {"time ratio": time_ratio, "FLOPs ratio": flops_ratio, "time / FLOPs": time_ratio / flops_ratio}


def timed_steps(run: Run, size: str, variant: str, micro_batch: int) -> tuple[Row, float]:
    """Training steps on random tokens, and one under the profiler; FLOPs a token of the forward pass."""
    config = settings(run, size, variant, micro_batch)
    engine = engine_of(config)
    batches = random_batches(config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def step(lr: float = 1e-6) -> object:
        return train_step(engine, batches, config, 1, lr=lr)

    for _ in range(2 + EAGER_STEPS * config.training.enable_cuda_graph):
        step()  # waits for the device
    times = []
    for _ in range(2 if run.small else 4):
        start = time.perf_counter()
        report = step()
        times.append(time.perf_counter() - start)
    fractions = measured_fractions(report.routing, config.recursion.num_recursions)
    flops = executed_flops_per_token(config, fractions)
    tokens = config.training.global_batch_size * config.data.seq_length
    peak, _ = device_peak(config)
    median = statistics.median(times)
    row: Row = {
        "size": size,
        "model": variant,
        "micro-batch": micro_batch,
        "ms/iteration": 1e3 * median,
        "spread": (max(times) - min(times)) / median,
        "tokens/s": tokens / median,
        "MFU": 3.0 * flops * tokens / median / 1e12 / peak,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "loss": report.lm_loss,
        "failed": not report.applied,
    }
    return row | where_the_time_goes(step, median), flops


KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa", "varlen"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm", "splitk"),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("memcpy", "memset", "copy", "index", "gather", "scatter", "cat", "elementwise_kernel_with_index"),
}
"""Kinds of kernels, by what their names contain; the first that fits counts, and the rest is element-wise."""


def kind_of(kernel: str) -> str:
    """Which kind a kernel is."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "element-wise")


def where_the_time_goes(step: Callable[[], object], seconds: float) -> Row:
    """Shares of one step's kernels by kind, and how long the device idles in a step of `seconds` (without profiler)."""
    cuda = torch.cuda.is_available()
    wait()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        wait()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[event.key] += event.self_device_time_total if cuda else event.self_cpu_time_total
    kinds: Counter[str] = Counter()
    for name, microseconds in spent.items():
        kinds[kind_of(name)] += microseconds
    busy = sum(spent.values())
    row: Row = {kind: kinds[kind] / busy for kind in (*KINDS, "element-wise")}
    row["idle"] = max(0.0, 1.0 - busy / 1e6 / seconds)
    row["top kernels"] = [(name[:160], round(us / 1e3, 3)) for name, us in spent.most_common(40)]
    return row


def syncs(run: Run) -> Iterator[Row]:
    """For each kind of model, where the second iteration, and a token of its export, wait for the device."""
    from gpu_check_numbers import MODELS, config_of, walk

    for model in list(MODELS)[:1] if run.small else MODELS:
        config = config_of(model, bf16=not run.small)
        initialize_distributed(config)
        engine = engine_of(config)
        batch = walk(1).to(device())
        train_step(engine, iter([batch]), config, 1, lr=1e-6)
        yield {"model": model} | waits_of(partial(train_step, engine, iter([batch]), config, 2, lr=1e-6))
        del engine
        release()
    yield from decoding_waits(run)


def decoding_waits(run: Run) -> Iterator[Row]:
    """Where a decoded token of one sequence or eight waits, without transformers' own loop."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import generate

    sizes = "--prompt 40 --new 8 --hidden-size 128 --ffn-hidden-size 256 --num-layers 8 --vocab-size 512"
    args = generate.parse([*sizes.split(), "--device", device().type, "--clock", "wall"])
    ids = torch.randint(0, 512, (8, 40), generator=torch.Generator().manual_seed(0)).to(device())
    for name in list(generate.MODELS)[:1] if run.small else generate.MODELS:
        model = generate.build(name, args, ids).model
        for batch in (1, 8):
            with torch.no_grad():
                cache = model(ids[:batch, :-2], use_cache=True).cache
                model(ids[:batch, -2:-1], cache=cache)
                found = waits_of(partial(model, ids[:batch, -1:], cache=cache))
            yield {"model": f"{name}, token of {batch}"} | found


def waits_of(function: Callable[[], object]) -> Row:
    """How often a call waits for the device, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    sites = Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)
    return {"waits": len(found), "sites": "; ".join(f"{n} x {s}" for s, n in sites.most_common())}


def fused(run: Run) -> Iterator[Row]:
    """Element-wise kernels of a layer, head and loss, against plain PyTorch, by `benchmarks/fused.py`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import fused as benchmark

    for row in benchmark.measure(run.device, ["tiny"] if run.small else ["1.7b", "135m"]):
        # Rounding to 8 bits, relative to the largest value; plain PyTorch rounds more often.
        right = all(row.get(error, 0.0) <= 0.02 for error in ("error", "gradient_error"))
        yield row | {"failed": row["by"] == "chosen" and ("refused" in row or not right)}


def attention(run: Run) -> Iterator[Row]:
    """Attention backends on the shapes that models have, by `benchmarks/attention.py`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import attention as benchmark

    sizes, seconds = (["tiny"], 2.0) if run.small else (["1.7b", "360m"], 60.0)
    for row in benchmark.measure(seconds, sizes, run.device):
        # bf16 keeps 8 bits; a wrong mask is off by the size of the values. The CPU's way is not for a GPU.
        right = all(row.get(error, 0.0) <= 0.05 for error in ("error", "gradient_error"))
        yield row | {"failed": not right and row["kernel"] != "in blocks"}


def graphs(run: Run) -> Iterator[Row]:
    """135M with `--enable-cuda-graph` and without: equal losses, and what launches cost."""
    if run.small:
        yield {"what": "a CPU has no CUDA graphs"}
        return
    for variant in ("mor_expert_nr3", "mor_expert_nr3_kv_sharing", "vanilla"):
        eager, replayed = (curve(settings(run, "135m", variant + flag, 16)) for flag in ("", " --enable-cuda-graph"))
        difference = max(abs(a - b) / b for a, b in zip(replayed.losses, eager.losses, strict=True))
        yield {
            "model": variant,
            "ms/iteration": 1e3 * eager.seconds,
            "MFU": eager.mfu,
            "with graph": 1e3 * replayed.seconds,
            "MFU with graph": replayed.mfu,
            "time ratio": replayed.seconds / eager.seconds,
            "loss difference": difference,
            "failed": not difference < 1e-3,  # kernels that add in any order
        }


class Curve(NamedTuple):
    """A short run on one batch."""

    losses: list[float]
    seconds: float
    """Of a step, median of the last three, which a graph replays."""
    mfu: float


def curve(config: Config, steps: int = 7) -> Curve:
    """Losses, and how fast the last steps are."""
    torch.manual_seed(0)
    engine, batches, losses, times = engine_of(config), random_batches(config), [], []
    for iteration in range(1, 1 + steps):
        start = time.perf_counter()
        report = train_step(engine, batches, config, iteration, lr=1e-4)
        losses.append(report.lm_loss)
        wait()
        times.append(time.perf_counter() - start)
    fractions = measured_fractions(report.routing, config.recursion.num_recursions)
    flops = 3.0 * executed_flops_per_token(config, fractions) * config.training.global_batch_size
    flops *= config.data.seq_length
    seconds = statistics.median(times[-3:])
    del engine
    release()
    return Curve(losses, seconds, flops / seconds / 1e12 / device_peak(config)[0])


def decoding(run: Run) -> Iterator[Row]:
    """Time per generated token of exported models, by `benchmarks/generate.py`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import generate
    import transformers

    transformers.utils.logging.set_verbosity_error()
    words = "--batch-sizes 1 --rounds 1 --prompt 16 --new 4 --hidden-size 64 --ffn-hidden-size 128"
    words += " --models vanilla expert"
    if not run.small:
        words = "--batch-sizes 1 32 --rounds 1 2 --prompt 256 --new 32 --hidden-size 576 --ffn-hidden-size 1536"
        words += " --num-layers 32 --vocab-size 49152 --device cuda --dtype bf16 --clock wall"
    for row in generate.measure(generate.parse(words.split())):
        milliseconds = 1e3 * row["batch"] / row["decode_tokens_per_second"]
        yield {"batch": row["batch"], "model": row["model"], "ms/token": milliseconds} | {
            name: row.get(name) for name in ("decode_to_vanilla", "first_to_vanilla", "mean_depth")
        }


def release() -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
