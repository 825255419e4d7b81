"""On an accelerator, all tensors of a step are there, and the host waits for it a known number of times.

The accelerator is a pretended one (accelerator.py). Numbers are those of docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import table
import torch
from accelerator import Accelerator
from layout_runs import my_batches
from megatron.core import parallel_state
from table import Layout, build_config
from torch.nn.attention import SDPBackend
from worker_pool import WorkerPool

from mor_megatron.config.schema import Config
from mor_megatron.distributed import cpu
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model import layer_spec
from mor_megatron.model.attention_by_shape import AttentionKernels
from mor_megatron.model.mor_model import build_model
from mor_megatron.pipeline.schedule import run_schedule
from mor_megatron.recursion.context import RoutingContext, Selection
from mor_megatron.training.train_step import masked_sum

ONE = Layout("one", global_batch=table.MICRO_BATCH)
TP2_SP = Layout("tp2-sp", tp=2, sequence_parallel=True, global_batch=table.MICRO_BATCH)
PP2 = Layout("pp2", pp=2, global_batch=2 * table.MICRO_BATCH)
KERNELS = AttentionKernels((SDPBackend.MATH,), frozenset(), no_varlen="not here", no_ranges="not here")
FULL = {"recompute_granularity": "full"}


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerPool]:
    """Two that have the accelerator, which no other test should."""
    pool = WorkerPool(2)
    yield pool
    pool.stop()


def run(config: Config, selection: Selection, accelerator: Accelerator | None = None) -> tuple[list[float], list[str]]:
    """Two steps of AdamW, or two evaluations by threshold: the losses, and where the host waited in the second."""
    model = build_model(config).train(selection == "capacity")
    if accelerator is not None:
        accelerator.move(model)
        model.rows.device = accelerator.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, foreach=False)
    losses: list[torch.Tensor] = []

    def loss(values, batch):
        losses.append(masked_sum(values, batch))
        return losses[-1] / 100

    for step in (1, 2):
        batches = list(my_batches(config, step))
        if accelerator is not None:
            batches = list(map(accelerator.put, batches))
        with nullcontext([]) if accelerator is None else accelerator.counting() as waits:
            make_context, forward_only = partial(RoutingContext, step, selection), selection == "threshold"
            run_schedule(model, batches, len(batches), make_context, loss, forward_only)
        optimizer.step()
        optimizer.zero_grad()
    return [value.item() for value in losses], waits


def run_twice(config: Config, selection: Selection = "capacity") -> list[str]:
    """On the CPU and on the accelerator: the waits, if the losses are equal."""
    accelerator = Accelerator()
    initialize_distributed(config)
    buffers = parallel_state.get_global_memory_buffer().buffer
    expected, _ = run(config, selection)
    cpu.stand_in(accelerator.device)
    buffers.clear()
    try:
        with accelerator, patch.object(layer_spec, "attention_kernels", lambda config: KERNELS):
            losses, waits = run(config, selection, accelerator)
    finally:
        cpu.stand_in(torch.device("cpu"))
        buffers.clear()
    assert losses == pytest.approx(expected, rel=1e-2 if config.training.bf16 else 1e-5)
    return waits


def waits_of(processes: WorkerPool, layout: Layout, model: str, selection: Selection = "capacity", **changes) -> int:
    """Waits for each micro-batch, the same on every rank."""
    with patch.object(table, "BLOCK", 2):
        config = build_config(model, layout, "adam", **changes)
    found = processes.run(layout.world_size, layout.groups, run_twice, config, selection)
    (count,) = {len(waits) for waits in found}
    micro_batches = layout.global_batch // table.MICRO_BATCH
    assert count % micro_batches == 0, found
    return count // micro_batches


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("vanilla", {}),
        ("middle-sequence", {}),
        ("expert-nr3", FULL),
        ("expert-sharing", FULL | {"recompute_unit": "layer", "bf16": True}),
        ("expert-sharing-update", {"recompute_granularity": "selective"}),
        pytest.param("expert-aux-router", {"recompute_granularity": "selective"}, marks=pytest.mark.slow),
        pytest.param("expert-gqa", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_capacities_are_known_to_the_host(processes, model, changes):
    assert waits_of(processes, ONE, model, **changes) == 0


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("token-balance", FULL),
        pytest.param("token-loss-free", {}, marks=pytest.mark.slow),
        ("token-sharing", FULL | {"recompute_unit": "layer", "bf16": True}),
    ],
    ids=str,
)
def test_depths_come_to_the_host_once(processes, model, changes):
    assert waits_of(processes, ONE, model, **changes) == 1


def test_a_threshold_is_waited_for_where_it_decides(processes):
    """Before each recursion but the first."""
    assert waits_of(processes, ONE, "expert-nr3", "threshold") == 2


@pytest.mark.parametrize(("model", "count"), [("expert-nr3", 0), ("token-balance", 1)])
def test_a_ring_adds_nothing(processes, model, count):
    assert waits_of(processes, PP2, model) == count


@pytest.mark.parametrize(("model", "count"), [("expert-nr3", 3), ("token-balance", 1 + 6)])
def test_rows_cut_by_sequence_are_counted_once_for_each_set(processes, model, count):
    """Expert-choice: out of the stream, from one recursion to the next, and back. Token-choice: those that leave, out
    of the rows and into the stream, and those that stay."""
    assert waits_of(processes, TP2_SP, model) == count
