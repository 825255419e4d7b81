"""Time of core attention by kind of shape and kernel, forward and with backward, and its distance from fp32.

    python benchmarks/attention.py --budget 120 --output attention.json

The kernels are those that `mor_megatron/model/attention_by_shape.py` chooses among, through the same class. *in blocks*
is the CPU's way, which reads lengths from the device. A kernel that fails is a row with the reason. Errors are relative
to the largest value of PyTorch's plain fp32 attention on the same inputs; of the gradients of q, k and v, the worst.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import torch
from processor import processor
from torch import Tensor
from torch.nn.attention import SDPBackend

from mor_megatron.model.attention import AttentionPattern, CoreAttention
from mor_megatron.model.attention_by_shape import AttentionByShape, AttentionKernels
from mor_megatron.model.attention_check import (
    LAYER,
    Attention,
    Heads,
    errors,
    expected,
    outputs_and_gradients,
    random_case,
)
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows

Row = dict[str, object]
CUDNN, FLASH, EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


@dataclass(frozen=True)
class Size:
    """Core attention of one model, and the micro-batch."""

    heads: int
    groups: int
    width: int = 64
    length: int = 2048
    batch: int = 4


SIZES = {"1.7b": Size(32, 32), "360m": Size(15, 5, batch=8), "tiny": Size(4, 2, 16, 256, 2)}


def rows_of(size: Size, device: str) -> Iterator[tuple[str, ActiveTokens, bool, bool]]:
    """Name, rows, whether they attend to the keys of all tokens, whether within documents; what matters first."""
    generator = torch.Generator().manual_seed(0)
    length, batch = size.length, size.batch
    everything = ActiveTokens(length, batch)

    def regular(k: int) -> ActiveTokens:
        positions = torch.rand(length, batch, generator=generator).argsort(0)[:k].sort(0).values
        return everything.take((positions * batch + torch.arange(batch)).to(device))

    def ragged(fraction: float) -> ActiveTokens:
        mask = torch.rand(length, batch, generator=generator) < fraction
        return LocalRows().keep(everything, mask.to(device))[0]

    two, third = length * 2 // 3, length // 3
    yield "all", everything, False, False
    yield f"{third} of {length}", regular(third), False, False
    yield f"{third} to keys of all", regular(third), True, False
    yield "ragged, about 2/3", ragged(2 / 3), False, False
    yield f"{two} to keys of all", regular(two), True, False
    yield "all, within documents", everything, False, True
    yield f"{two} of {length}", regular(two), False, False
    yield "ragged, about 2/3, to keys of all", ragged(2 / 3), True, False
    yield f"{two} to keys of all, within documents", regular(two), True, True


def plain_attention() -> CoreAttention:
    """The CPU's way."""
    return CoreAttention(*LAYER)


def kernels_for(pattern: AttentionPattern) -> dict[str, Attention]:
    """Everything that computes this pattern."""
    lengths = frozenset(range(pattern.metadata.seq_length + 1))

    def by_shape(*fixed: SDPBackend, **obstacles: str) -> AttentionByShape:
        return AttentionByShape(*LAYER, kernels=AttentionKernels(fixed, lengths, **obstacles))

    if pattern.masked:
        named: dict[str, Attention] = {"ranges": by_shape()}
        if pattern.metadata.document_ids is None:
            for name, backend in (("cuDNN", CUDNN), ("flash", FLASH)):
                named[f"spread, {name}"] = by_shape(backend, no_ranges="measured without")
        else:
            named["masked"] = by_shape(no_ranges="measured without")
        return named | {"in blocks": plain_attention()}
    if pattern.active.ragged:
        named = {"ranges": by_shape(), "varlen": by_shape(no_ranges="measured without")}
        padded = {"padded, cuDNN": CUDNN, "padded, flash": FLASH}
    else:
        named, padded = {}, {"cuDNN": CUDNN, "flash": FLASH, "efficient": EFFICIENT}
    others = {"no_ranges": "measured without", "no_varlen": "measured without"}
    return named | {name: by_shape(backend, **others) for name, backend in padded.items()}


def measure(budget: float, sizes: list[str], device: str) -> Iterator[Row]:
    """One row for each size, kind of rows and kernel; none is begun after `budget` seconds.

    Yields:
        size, rows and kernel; first_s, the seconds of the first call, in which plans are made and kernels compiled;
        forward_ms and both_ms, medians; error and gradient_error. Or size, rows, kernel and refused, the reason.
    """
    end = time.perf_counter() + budget
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for size in sizes:
        for name, active, keys_of_all, documents in rows_of(SIZES[size], device):
            pattern, inputs = _case(SIZES[size], active, keys_of_all, documents, device, dtype)
            reference = expected(pattern, inputs)
            for kernel, attention in kernels_for(pattern).items():
                if time.perf_counter() > end:
                    return
                row: Row = {"size": size, "rows": name, "kernel": kernel}
                try:
                    row |= _measured(attention, pattern, inputs, reference, device)
                except Exception as error:  # a kernel, its compiler or the driver refuses
                    row["refused"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
                yield row


def _case(
    size: Size, active: ActiveTokens, keys_of_all: bool, documents: bool, device: str, dtype: torch.dtype
) -> tuple[AttentionPattern, list[Tensor]]:
    """The pattern, and query, key, value and the gradient of the output."""
    ids = torch.arange(size.length, device=device).div(size.length / 5, rounding_mode="floor").expand(size.batch, -1)
    heads = Heads(size.heads, size.groups, size.width, dtype, device)
    return random_case(heads, active, keys_of_all, ids if documents else None)


def _measured(
    attention: Attention, pattern: AttentionPattern, inputs: list[Tensor], reference: list[Tensor], device: str
) -> Row:
    start = time.perf_counter()
    found = outputs_and_gradients(attention, pattern, inputs)
    _wait(device)
    first = time.perf_counter() - start
    error, *of_gradients = errors(found, reference)
    del found
    with torch.no_grad():
        forward = _milliseconds(lambda: attention(*inputs[:3], pattern), device)
    return {
        "first_s": first,
        "forward_ms": forward,
        "both_ms": _milliseconds(lambda: outputs_and_gradients(attention, pattern, inputs), device),
        "error": error,
        "gradient_error": max(of_gradients),
    }


def _milliseconds(run: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Median time of one call; on a GPU, of the device, for which the host is ahead in a training step."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds if device == "cuda" else 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _keep_busy()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@cache
def _long_product() -> Tensor:
    return torch.zeros(8192, 8192, dtype=torch.bfloat16, device="cuda")


def _keep_busy() -> None:
    """Some milliseconds of work, during which the host launches what is measured."""
    for _ in range(3):
        _long_product() @ _long_product()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(row: Row) -> None:
    """One line of the table."""
    place = f"{row['size']:5} {row['rows']:44} {row['kernel']:15}"
    if "refused" in row:
        print(f"{place} {row['refused']}", flush=True)
        return
    times = f"{row['forward_ms']:8.3f} {row['both_ms']:8.3f} {row['first_s']:8.2f}"
    print(f"{place} {times} {row['error']:9.1e} {row['gradient_error']:9.1e}", flush=True)


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=180.0, help="seconds after which no measurement begins")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: 1.7b 360m with CUDA, tiny without")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    sizes = args.sizes or (["1.7b", "360m"] if args.device == "cuda" else ["tiny"])
    print(
        f"{'size':5} {'rows':44} {'kernel':15} {'forward':>8} {'both ms':>8} {'first s':>8} {'error':>9} {'of grad':>9}"
    )
    rows = []
    for row in measure(args.budget, sizes, args.device):
        show(row)
        rows.append(row)
    if args.output:
        card = torch.cuda.get_device_name() if args.device == "cuda" else processor()
        args.output.write_text(json.dumps({"device": card, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
