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
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import torch
from processor import processor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor_megatron.model.attention import AttentionMetadata, AttentionPattern, CoreAttention, RotaryTable
from mor_megatron.model.attention_by_shape import AttentionByShape, AttentionKernels
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows

Row = dict[str, object]
LAYER = (SimpleNamespace(attention_dropout=0.0), 1, None, "self")
"""What a core attention is built with; it reads no more of the configuration."""
Attention = Callable[[Tensor, Tensor, Tensor, AttentionPattern], Tensor]
CUDNN, FLASH, EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


@dataclass(frozen=True)
class Heads:
    """Core attention of one model, and the micro-batch."""

    heads: int
    groups: int
    width: int = 64
    length: int = 2048
    batch: int = 4


SIZES = {"1.7b": Heads(32, 32), "360m": Heads(15, 5, batch=8), "tiny": Heads(4, 2, 16, 256, 2)}


def rows_of(size: Heads, device: str) -> Iterator[tuple[str, ActiveTokens, bool, bool]]:
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
        named: dict[str, Attention] = {"flex": by_shape()}
        if pattern.metadata.document_ids is None:
            for name, backend in (("cuDNN", CUDNN), ("flash", FLASH)):
                named[f"spread, {name}"] = by_shape(backend, no_flex="measured without")
        else:
            named["masked"] = by_shape(no_flex="measured without")
        return named | {"in blocks": plain_attention()}
    if pattern.active.ragged:
        named = {"varlen": by_shape()}
        padded = {"padded, cuDNN": CUDNN, "padded, flash": FLASH}
    else:
        named, padded = {}, {"cuDNN": CUDNN, "flash": FLASH, "efficient": EFFICIENT}
    return named | {name: by_shape(backend, no_varlen="measured without") for name, backend in padded.items()}


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
            reference = _reference(pattern, inputs)
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
    size: Heads, active: ActiveTokens, keys_of_all: bool, documents: bool, device: str, dtype: torch.dtype
) -> tuple[AttentionPattern, list[Tensor]]:
    """The pattern, and query, key, value and the gradient of the output."""
    torch.manual_seed(0)
    ids = torch.arange(size.length, device=device).div(size.length / 5, rounding_mode="floor")
    metadata = AttentionMetadata(
        RotaryTable(size.width, size.length, 1e4).to(device),
        size.length,
        size.batch,
        dtype,
        document_ids=ids.expand(size.batch, -1) if documents else None,
    )
    keys = (size.length, size.batch) if keys_of_all else active.shape
    shapes = [(*active.shape, size.heads), *[(*keys, size.groups)] * 2]
    inputs = [torch.randn(*shape, size.width, device=device, dtype=dtype) for shape in shapes]
    return AttentionPattern(metadata, active, keys_of_all), [*inputs, torch.randn_like(inputs[0]).flatten(2)]


def _run(attention: Attention, pattern: AttentionPattern, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    *parts, grad = inputs
    leaves = [x.detach().requires_grad_() for x in parts]
    out = attention(*leaves, pattern)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _reference(pattern: AttentionPattern, inputs: list[Tensor]) -> list[Tensor]:
    metadata = replace(pattern.metadata, dtype=torch.float32)
    exact = AttentionPattern(metadata, pattern.active, pattern.keys_of_all)
    with sdpa_kernel(SDPBackend.MATH):
        return _run(plain_attention(), exact, [x.float() for x in inputs])


def _measured(
    attention: Attention, pattern: AttentionPattern, inputs: list[Tensor], reference: list[Tensor], device: str
) -> Row:
    start = time.perf_counter()
    got = _run(attention, pattern, inputs)
    _wait(device)
    first = time.perf_counter() - start
    errors = torch.stack([(a.float() - b).abs().max() / b.abs().max() for a, b in zip(got, reference, strict=True)])
    del got
    with torch.no_grad():
        forward = _milliseconds(lambda: attention(*inputs[:3], pattern), device)
    return {
        "first_s": first,
        "forward_ms": forward,
        "both_ms": _milliseconds(lambda: _run(attention, pattern, inputs), device),
        "error": float(errors[0]),
        "gradient_error": float(errors[1:].max()),
    }


def _milliseconds(run: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Median time of one call."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds if device == "cuda" else 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
