"""The order in which a pipeline rank runs its forward and backward passes: that of Megatron-core's schedules."""

from __future__ import annotations

from functools import lru_cache

from mor_megatron.planning.stages import PipelinePlan, microbatch_group_size


def passes(pipeline: PipelinePlan, stage: int, num_microbatches: int) -> tuple[int, ...]:
    """The passes of a rank until they repeat: c for a forward pass of chunk c, ~c (below 0) for a backward pass.

    Raises:
        ValueError: too few micro-batches for a ring.
    """
    return _passes(pipeline.num_stages, pipeline.num_chunks, stage, num_microbatches)


@lru_cache(maxsize=4096)
def _passes(stages: int, chunks: int, stage: int, count: int) -> tuple[int, ...]:
    warmup, group = stages - 1 - stage, stages
    if chunks > 1:
        group = microbatch_group_size(count, stages)
        warmup = 2 * warmup + (chunks - 1) * group
    count = min(count, 3 * group)  # later groups repeat the second one
    forward = [
        chunk
        for start in range(0, count, group)
        for chunk in range(chunks)
        for _ in range(min(group, count - start))
    ]  # fmt: skip
    backward = [~(chunks - 1 - chunk) for chunk in forward]
    order = forward[:warmup]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += [ahead, behind]
    return (*order, *backward[len(forward[warmup:]) :])
