"""The layout of a run in words and numbers: who holds what, how much it is, and how long a rank waits.

`--dry-run` prints it with the recursion plan; a run prints it at its start. All of it is arithmetic on the settings.
"""

from __future__ import annotations

from collections.abc import Callable

from mor_megatron.config.layout import data_parallel_size
from mor_megatron.config.schema import Config, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
from mor_megatron.planning.accounting import (
    FORWARDS_PER_STEP,
    count_parameters,
    executed_flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
    recursion_embedding_parameters,
    relaxation_parameters,
    router_parameters,
)
from mor_megatron.planning.memory import RankMemory, num_microbatches, rank_memory
from mor_megatron.planning.stages import PipelinePlan, microbatch_group_size, pipeline_plan


def dry_run(
    config: Config, world_size: int | None, read_teacher: Callable[[Config], Config | None] = lambda config: None
) -> str:
    """Everything that a run would do, as text: its recursion plan and its layout.

    Args:
        config: as parsed.
        world_size: ranks of the run; None: as many as one copy of the model needs.
        read_teacher: settings of the model of `distill_from`, where a run has one.
    Raises:
        ValueError: the settings do not fit, or there is neither a vocabulary size nor a tokenizer.
    """
    parallel = config.parallel
    ranks = world_size or parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    config = validate(config, ranks)
    config = resolve_vocabulary(config, configured_tokenizer(config.data))
    return f"{config.plan.table()}\n\n{describe_layout(config, ranks, cuda=True, teacher=read_teacher(config))}"


def describe_layout(config: Config, world_size: int, cuda: bool, teacher: Config | None = None) -> str:
    """Ranks, stages, memory, split, schedule and batch of a run, a line each.

    Args:
        config: validated for `world_size` ranks, its vocabulary resolved.
        world_size: ranks of the run.
        cuda: whether they have CUDA devices, which decides what is `auto`.
        teacher: settings of the model of `distill_from`.
    """
    pipeline = pipeline_plan(config, teacher)
    lines = [_ranks(config, world_size), *_stages(config, world_size, pipeline, cuda)]
    if pipeline.num_stages > 1:
        lines.append(_split(config, pipeline))
    if config.recursion.is_relaxed:
        own = pipeline.plan.block_size * relaxation_parameters(config) + recursion_embedding_parameters(config)
        lines.append(f"recursions differ by {config.recursion.differences}: {own:,} parameters")
    if pipeline.teacher is not None:
        lines.append(_teacher(config, pipeline, world_size))
    return "\n".join([*lines, _batch(config, world_size), _schedule(config, world_size, pipeline)])


def stage_work(config: Config, pipeline: PipelinePlan) -> tuple[float, ...]:
    """Share of each pipeline rank in the FLOPs of a training token, with the planned number of tokens a recursion."""
    layer_flops = layer_flops_per_token(config)
    work = [
        sum(layer_flops[layer.index] for chunk in range(pipeline.num_chunks) for layer in pipeline.layers(stage, chunk))
        for stage in range(pipeline.num_stages)
    ]
    work[-1] += head_flops_per_token(config)
    if pipeline.teacher is not None:
        work[-1] += executed_flops_per_token(pipeline.teacher) / FORWARDS_PER_STEP
    return tuple(part / sum(work) for part in work)


def _ranks(config: Config, world_size: int) -> str:
    parallel, training = config.parallel, config.training
    sequence = " with sequence parallel" if parallel.sequence_parallel else ""
    return (
        f"layout: {_count(world_size, 'rank')} = TP {parallel.tensor_model_parallel_size}{sequence} x "
        f"PP {parallel.pipeline_model_parallel_size} x DP {data_parallel_size(config, world_size)}, "
        f"ZeRO {training.zero_stage}, {training.precision}"
    )


def _stages(config: Config, world_size: int, pipeline: PipelinePlan, cuda: bool) -> list[str]:
    """A table: one line a pipeline rank, numbers of one of its ranks; activations are those at the peak of memory."""
    per_stage = world_size // pipeline.num_stages
    where = " (CPU)" if config.training.optimizer_cpu_offload else ""
    state = ("weights", "gradients", f"optimizer{where}", "sum")
    teacher = () if pipeline.teacher is None else ("teacher",)
    rows = [("ranks", "holds", "parameters", *state, *teacher, "buffers", "activations", "peak", "work")]
    for stage, work in enumerate(stage_work(config, pipeline)):
        memory = rank_memory(config, pipeline, stage, world_size, cuda)
        ranks = _span(range(stage * per_stage, (stage + 1) * per_stage))
        cells = _memory_cells(memory, pipeline.teacher is not None)
        rows.append((ranks, _holds(config, pipeline, stage), *cells, f"{100 * work:.1f}%"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _memory_cells(memory: RankMemory, has_teacher: bool) -> tuple[str, ...]:
    state = memory.state
    parts = [state.weights, state.gradients, state.optimizer, state.total]
    parts += [memory.teacher] if has_teacher else []
    return (f"{state.parameters:,}", *map(_bytes, (*parts, memory.buffers, memory.peak.total, memory.total)))


def _holds(config: Config, pipeline: PipelinePlan, stage: int) -> str:
    is_first, is_last = stage == 0, stage == pipeline.num_stages - 1
    parts = []
    if is_first:
        parts.append("embedding")
        if router_parameters(config) > 0:
            parts.append("routers")
    layers = pipeline.physical_layers(stage)
    parts.append(f"{'layer' if len(layers) == 1 else 'layers'} {_span(layers)}")
    if is_last:
        tied = not config.model.untie_embeddings_and_output_weights
        parts.append("head" if not tied else "head (the embedding)" if is_first else "head (copy of the embedding)")
    return ", ".join(parts)


def _split(config: Config, pipeline: PipelinePlan) -> str:
    work = stage_work(config, pipeline)
    excess = 100 * (max(work) * len(work) - 1)
    slowest = work.index(max(work))
    reason = "as given" if config.parallel.pipeline_layers else "the best balance of FLOPs, ends and head counted"
    layers = " + ".join(map(str, pipeline.block_layers))
    return (
        f"split: {layers} of the block's {pipeline.plan.block_size} layers, {reason}; "
        f"stage {slowest} has {excess:.1f}% more work than the mean"
    )


def _teacher(config: Config, pipeline: PipelinePlan, world_size: int) -> str:
    teacher, last = pipeline.teacher, world_size - world_size // pipeline.num_stages
    ranks = _span(range(last, world_size))
    return (
        f"teacher: {count_parameters(teacher).unique:,} parameters on {'rank' if ranks.isdecimal() else 'ranks'} "
        f"{ranks}, divided by TP {config.parallel.tensor_model_parallel_size} alone; "
        f"{executed_flops_per_token(teacher) / 1e6:.1f} MFLOP a token forward"
    )


def _batch(config: Config, world_size: int) -> str:
    training = config.training
    count = _count(num_microbatches(config, world_size), "micro-batch", "es")
    ranks = _count(data_parallel_size(config, world_size), "data-parallel rank")
    return (
        f"batch: {training.global_batch_size} sequences of {config.data.seq_length} tokens = "
        f"{training.micro_batch_size} a micro-batch x {count} x {ranks}{_growth(training)}"
    )


def _growth(training: TrainingConfig) -> str:
    if training.rampup_batch_size is None:
        return ""
    start, increment, samples = training.rampup_batch_size
    return f", reached from {start} by {increment} over the first {samples:,} sequences"


def _schedule(config: Config, world_size: int, pipeline: PipelinePlan) -> str:
    stages, chunks = pipeline.num_stages, pipeline.num_chunks
    if stages == 1:
        return "schedule: no pipeline, micro-batches one after another"
    count = num_microbatches(config, world_size)
    what = "one forward, one backward"
    if pipeline.is_ring:
        group = microbatch_group_size(count, stages)
        what = f"ring, {chunks} virtual stages a rank (one a recursion), micro-batches in groups of {group}"
    formula = f"({stages} - 1) / ({count} x {chunks} + {stages} - 1)"
    return f"schedule: {what}; a rank waits {100 * pipeline.idle_share(count):.1f}% of the time = {formula}"


def _span(numbers: range | tuple[int, ...]) -> str:
    """Ascending numbers without gaps, as `3` or `0-3`."""
    assert numbers[-1] - numbers[0] == len(numbers) - 1
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
