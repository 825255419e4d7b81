"""Time of element-wise work, and of head and loss, against plain PyTorch, and their distance from it in fp32.

    python benchmarks/fused.py --output fused.json

*plain* are the definitions of `mor_megatron/model/elementwise.py`, *chosen* is what this device runs, *hand-written*
what a CPU runs. Losses are computed in chunks (*chosen*), as a whole, and in chunks without Triton. Rates count the
fewest bytes that forward and backward can read and write. Errors are relative to the largest value in fp32; of
gradients, the worst.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import torch
from attention import _milliseconds as milliseconds
from processor import processor
from torch import Tensor

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model import elementwise, loss

Row = dict[str, object]
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Size:
    """One layer and its head, and the rows of a micro-batch."""

    rows: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    loss_rows: int


SIZES = {
    "1.7b": Size(16384, 2048, 8192, 32, 32, 49152, 8192),
    "135m": Size(32768, 576, 1536, 9, 3, 49152, 8192),
    "tiny": Size(512, 64, 176, 4, 2, 512, 256),
}


@dataclass(frozen=True)
class Case:
    """A function by its name in `Elementwise`."""

    name: str
    inputs: tuple
    trained: int
    """The first so many inputs get gradients."""
    numbers: int = 0
    """The fewest that forward and backward read and write."""


def cases(size: Size, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """What a layer and a recursion of two thirds of the tokens compute."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    rows, hidden, width = size.rows, size.hidden, size.hidden // size.heads
    yield Case("rms_norm", (draw(rows, 1, hidden), draw(hidden), 1e-5), 2, 5 * rows * hidden)
    yield Case("add_norm", (draw(rows, 1, hidden), draw(rows, 1, hidden), draw(hidden), 1e-5), 3, 8 * rows * hidden)
    yield Case("swiglu", (draw(rows, 1, 2 * size.ffn),), 1, 8 * rows * size.ffn)
    angle = torch.rand(rows, 1, 1, 1, width // 2, device=device, generator=generator)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    per_group = size.heads // size.groups
    mixed = draw(rows, 1, size.groups, per_group + 2, width)
    yield Case("split_rotate", (mixed, cos, sin), 1, 4 * mixed.numel())
    yield Case("rotate", (draw(rows, 1, size.heads, width), cos.squeeze(3), sin.squeeze(3)), 1, 4 * rows * hidden)
    index = torch.randperm(rows, device=device, generator=generator)[: rows * 2 // 3]
    update, gate = draw(len(index), hidden), draw(len(index), 1)
    yield Case("add_rows", (draw(rows, hidden), update, gate, index), 3, 2 * rows * hidden + 4 * update.numel())


def run(function: Function, case: Case, inputs: tuple, grads: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of the trained inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs[: case.trained]]
    outputs = _tuple(function(*leaves, *inputs[case.trained :]))
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def measure(device: str, sizes: list[str]) -> Iterator[Row]:
    """One row for each size, function and implementation.

    Yields:
        size, what, by; forward_ms and both_ms, medians; gb_per_s but for the loss; error and gradient_error; peak_gb
        with CUDA. Or size, what, by and refused, the reason.
    """
    initialize_distributed(Config())  # the loss asks who divides the vocabulary
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    named = {"chosen": elementwise.implementation(device), "plain": elementwise.PLAIN}
    if device == "cuda":
        named["hand-written"] = elementwise.HAND_WRITTEN
    for size in sizes:
        for case in cases(SIZES[size], device, dtype):
            functions = {by: getattr(each, case.name) for by, each in named.items()}
            yield from _measured(size, case, functions, functions["plain"], device)
        case, functions = losses(SIZES[size], device, dtype)
        yield from _measured(size, case, functions, functions["whole"], device)


def _measured(size: str, case: Case, functions: dict[str, Function], reference: Function, device: str) -> Iterator[Row]:
    exact = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.inputs)
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in _tuple(reference(*case.inputs))]
    if case.name == "loss":
        grads = [torch.ones_like(grad) / len(grad) for grad in grads]
    expected = run(reference, case, exact, [grad.float() for grad in grads])
    for by, function in functions.items():
        row: Row = {"size": size, "what": case.name, "by": by}
        try:
            row |= _times_and_errors(function, case, grads, expected, device)
        except Exception as error:  # a kernel, its compiler or the driver refuses
            row["refused"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
        yield row


def _times_and_errors(function: Function, case: Case, grads: list[Tensor], expected: list[Tensor], device: str) -> Row:
    row: Row = {}
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    got = run(function, case, case.inputs, grads)
    if device == "cuda":
        row["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    del got
    with torch.no_grad():
        row["forward_ms"] = milliseconds(lambda: function(*case.inputs), device)
    row["both_ms"] = milliseconds(lambda: run(function, case, case.inputs, grads), device)
    if case.numbers > 0:
        row["gb_per_s"] = case.numbers * case.inputs[0].element_size() / row["both_ms"] / 1e6
    return row | {"error": max(errors[: len(grads)]), "gradient_error": max(errors[len(grads) :])}


def losses(size: Size, device: str, dtype: torch.dtype) -> tuple[Case, dict[str, Function]]:
    """Head and loss as a whole, in two chunks, and in two chunks without Triton."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(size.loss_rows, 1, size.hidden, device=device, generator=generator).to(dtype)
    weight = (torch.randn(size.vocabulary, size.hidden, device=device, generator=generator) * 0.02).to(dtype)
    labels = torch.randint(size.vocabulary, (size.loss_rows, 1), device=device, generator=generator)

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss.whole_losses(hidden @ weight.t(), labels, size.vocabulary)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss.chunked_losses(hidden, weight, labels, None, size.loss_rows // 2, size.vocabulary, False)

    def without_triton(hidden: Tensor, weight: Tensor) -> Tensor:
        with patch.object(loss, "implementation", lambda device_type: loss.cross_entropy):
            return chunked(hidden, weight)

    functions = {"chosen": chunked, "whole": whole, "chunks, no Triton": without_triton}
    return Case("loss", (hidden, weight), trained=2), functions


def show(row: Row) -> None:
    """One line of the table."""
    place = f"{row['size']:5} {row['what']:13} {row['by']:18}"
    if "refused" in row:
        print(f"{place} {row['refused']}", flush=True)
        return
    rate = f"{row['gb_per_s']:6.0f} GB/s" if "gb_per_s" in row else " " * 11
    memory = f" {row['peak_gb']:6.2f} GB" if "peak_gb" in row else ""
    times = f"{row['forward_ms']:8.3f} {row['both_ms']:8.3f}"
    print(f"{place} {times} {row['error']:9.1e} {row['gradient_error']:9.1e} {rate}{memory}", flush=True)


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: 1.7b 135m with CUDA, tiny without")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    sizes = args.sizes or (["1.7b", "135m"] if args.device == "cuda" else ["tiny"])
    print(f"{'size':5} {'what':13} {'by':18} {'forward':>8} {'both ms':>8} {'error':>9} {'of grad':>9}")
    rows = []
    for row in measure(args.device, sizes):
        show(row)
        rows.append(row)
    if args.output:
        card = torch.cuda.get_device_name() if args.device == "cuda" else processor()
        args.output.write_text(json.dumps({"device": card, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
