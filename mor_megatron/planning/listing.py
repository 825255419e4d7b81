"""What `tools/plan.py` prints: the layouts that fit and the first of them in detail, or what is missing."""

from __future__ import annotations

from dataclasses import replace

from mor_megatron.config.schema import Config
from mor_megatron.planning.activations import activations
from mor_megatron.planning.machines import GB, Machine
from mor_megatron.planning.search import RECOMPUTATION, Candidate, usable_bytes, worthwhile
from mor_megatron.planning.stages import pipeline_plan

HEAD = (
    "",
    "TP",
    "PP",
    "DP",
    "ZeRO",
    "micro",
    "recompute",
    "weights",
    "grads",
    "optim",
    "teacher",
    "buffers",
    "messages",
    "activ",
    "logits",
    "working",
    "total",
    "idle",
    "s/iter",
    "tokens/s",
    "MFU",
    "PFLOP",
    "TP sent",
    "PP sent",
    "DP sent",
)
TEACHER = HEAD.index("teacher")
"""A column that runs without a teacher do not have."""


def listing(found: list[Candidate], world_size: int, machine: Machine, count: int) -> str:
    """The fastest layouts that fit, a line each, then the first of them in detail.

    Args:
        found: all layouts that can run, fastest first.
        count: lines at most.
    Raises:
        ValueError: none fits; the message says which is closest, and by how much.
    """
    if not found:
        raise ValueError(
            f"gpus={world_size} cannot be divided among this model and batch: change --gpus or --global-batch-size, or "
            "give fewer settings of the layout"
        )
    usable = usable_bytes(machine)
    fitting = [one for one in found if one.memory.total <= usable]
    if not fitting:
        nearest = min(found, key=lambda one: one.memory.total)
        raise ValueError(
            f"none of {len(found)} layouts fits {world_size} x {_gb(usable)} GB ({machine.name}): the smallest needs "
            f"{_gb(nearest.memory.total)} GB, {_gb(nearest.memory.total - usable)} GB too much ({nearest.flags()}): "
            "use more --gpus, more --memory, or a shorter --seq-length"
        )
    config = fitting[0].config
    rows = [HEAD, *(_row(number, one, machine) for number, one in enumerate(worthwhile(fitting)[:count], 1))]
    if fitting[0].teacher is None:
        rows = [(*row[:TEACHER], *row[TEACHER + 1 :]) for row in rows]
    lines = [
        f"{world_size} x {machine.name}, {_gb(usable)} of {machine.memory_gb:g} GB for tensors; global batch "
        f"{config.training.global_batch_size} x {config.data.seq_length} tokens, {config.training.precision}",
        f"{len(found)} layouts can run, {len(fitting)} fit. Left out are those that differ from a faster one only in "
        "micro-batch or recomputation, and hardly need less memory.",
        "GB are those of the fullest rank, and those that one rank sends in an iteration. Times are estimates.",
        *_table(rows),
        "",
        *_details(fitting[0], machine),
    ]
    return "\n".join(lines)


def _row(number: int, one: Candidate, machine: Machine) -> tuple[str, ...]:
    parallel, training, memory, sent = one.config.parallel, one.config.training, one.memory, one.traffic
    sizes = (
        memory.state.weights,
        memory.state.gradients,
        memory.state.optimizer,
        memory.teacher,
        memory.buffers,
        memory.peak.messages,
        memory.peak.activations,
        memory.peak.logits,
        memory.peak.working,
        memory.total,
    )
    return (
        str(number),
        f"{parallel.tensor_model_parallel_size}{' SP' if parallel.sequence_parallel else ''}",
        str(parallel.pipeline_model_parallel_size),
        str(one.data_parallel_size),
        str(training.zero_stage),
        str(training.micro_batch_size),
        _recompute(one.config),
        *(_gb(size) for size in sizes),
        f"{one.time.idle_share:.1%}",
        f"{one.time.total:.3g}",
        f"{one.tokens_per_second:,.0f}",
        f"{one.mfu(machine):.0%}",
        f"{one.flops / 1e15:.4g}",
        _gb(sent.tensor),
        _gb(sent.pipeline + sent.embedding),
        _gb(sent.data),
    )


def _recompute(config: Config) -> str:
    training = config.training
    granularity = training.recompute_granularity
    return training.recompute_unit if granularity == "full" else granularity or "none"


def _details(one: Candidate, machine: Machine) -> list[str]:
    """Flags to paste, and what a micro-batch leaves on the first stage by recursion, however it is recomputed."""
    config, pipeline = one.config, pipeline_plan(one.config)
    count = config.recursion.num_recursions
    rows = [("recompute", *(f"recursion {r}" for r in range(count)), "most at once")]
    for choice in RECOMPUTATION:
        other = activations(replace(config, training=replace(config.training, **choice)), pipeline, 0, machine.is_cuda)
        name = _recompute(replace(config, training=replace(config.training, **choice)))
        rows.append((name, *(_gb(size) for size in other.kept), _gb(max(other.working))))
    time = one.time
    parts = {
        "compute": time.compute,
        "tensor parallel": time.tensor,
        "idle": time.idle,
        "messages": time.pipeline,
        "data parallel": time.data,
        "update": time.update,
    }
    return [
        "layout 1:",
        f"  {one.flags()}",
        f"  its memory peaks at: {one.memory.peak.name}",
        "  seconds of an iteration: " + ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items()),
        "  GB of activations that a micro-batch leaves on the first stage:",
        *(f"    {line}" for line in _table(rows)),
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _gb(size: float) -> str:
    return f"{size / GB:.3g}" if size < 100 * GB else f"{size / GB:.0f}"
