"""Which virtual layers run on which pipeline rank, and in which of its virtual stages.

With cycle sharing the pipeline is a ring: the block's layers are divided among the ranks once, and recursion r of a
micro-batch is its r-th round through them. Chunk r of a rank, a virtual stage of Megatron-core's interleaved schedule,
is recursion r, and all chunks of a rank run the same weights. Where recursions are not contiguous (sequence
sharing) or there is only one (Nr=1), the pipeline is an ordinary one, of one chunk a rank. Unique first and last
layers, embedding and head stand at the ends. A teacher runs as a whole on the last rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import head_flops_per_token, layer_flops_per_token
from mor_megatron.planning.teacher import beside
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer


@dataclass(frozen=True)
class PipelinePlan:
    """The pipeline of a run; build it with `pipeline_plan`."""

    plan: RecursionPlan
    block_layers: tuple[int, ...]
    """Shared-block layers of each rank, all >= 1, in the order of the ring."""
    teacher: Config | None = None
    """Settings of a teacher, from `teacher.beside`."""

    @property
    def num_stages(self) -> int:
        """P: pipeline ranks."""
        return len(self.block_layers)

    @property
    def is_ring(self) -> bool:
        """A micro-batch passes every rank once a recursion."""
        return self.num_stages > 1 and self.plan.num_recursions > 1 and self.plan.is_cyclic

    @property
    def num_chunks(self) -> int:
        """V: virtual stages of a rank; Nr in a ring, else 1."""
        return self.plan.num_recursions if self.is_ring else 1

    def layers(self, rank: int, chunk: int = 0) -> tuple[VirtualLayer, ...]:
        """What a rank runs in one chunk, in the order of execution; unique first and last layers included."""
        held = set(self._slots(rank))
        shared = [layer for layer in self.plan.shared if layer.physical in held]
        if self.is_ring:
            shared = [layer for layer in shared if layer.recursion == chunk]
        first = self.plan.first if rank == 0 and chunk == 0 else ()
        last = self.plan.last if rank == self.num_stages - 1 and chunk == self.num_chunks - 1 else ()
        return (*first, *shared, *last)

    def physical_layers(self, rank: int) -> tuple[int, ...]:
        """Unique layers whose weights a rank holds, ascending."""
        return tuple(sorted({layer.physical for chunk in range(self.num_chunks) for layer in self.layers(rank, chunk)}))

    def idle_share(self, num_microbatches: int) -> float:
        """Part of an iteration in which a rank of equal chunks waits: (P-1) / (M*V + P-1)."""
        return (self.num_stages - 1) / (num_microbatches * self.num_chunks + self.num_stages - 1)

    def _slots(self, rank: int) -> range:
        start = len(self.plan.first) + sum(self.block_layers[:rank])
        return range(start, start + self.block_layers[rank])


def pipeline_plan(config: Config, teacher: Config | None = None) -> PipelinePlan:
    """The pipeline of a validated run.

    Args:
        config: `pipeline_layers` decides the split if it is set; else `balanced_split` does, by FLOPs, the head's too.
        teacher: settings of the model of `distill_from`. It does not move the split.
    Raises:
        ValueError: no vocabulary size is known and the split has to be balanced.
    """
    plan, parallel = config.plan, config.parallel
    stages = parallel.pipeline_model_parallel_size
    placed = None if teacher is None else beside(config, teacher)
    if stages == 1:
        return PipelinePlan(plan, (plan.block_size,), placed)
    split = parallel.pipeline_layers or balanced_split(*_costs(config, plan), plan.block_size, stages)
    assert len(split) == stages, "validate the configuration"
    assert sum(split) == plan.block_size
    return PipelinePlan(plan, split, placed)


def balanced_split(layer: float, first: float, last: float, block_size: int, stages: int) -> tuple[int, ...]:
    """Block layers per rank such that the slowest rank is as fast as can be.

    Args:
        layer: work of one block layer over all its uses, any unit.
        first: extra work of the first rank (unique first layer).
        last: extra work of the last rank (unique last layer and head).
        block_size: K.
        stages: P, 1 <= P <= K.
    """
    assert 1 <= stages <= block_size
    if stages == 1:
        return (block_size,)

    def split(ends: tuple[int, int]) -> tuple[int, ...]:
        rest, middle = block_size - sum(ends), stages - 2
        inner = tuple(rest // middle + (i < rest % middle) for i in range(middle)) if middle else ()
        return (ends[0], *inner, ends[1])

    def loads(sizes: tuple[int, ...]) -> list[float]:
        extra = [first, *[0.0] * (stages - 2), last]
        return sorted((size * layer + more for size, more in zip(sizes, extra, strict=True)), reverse=True)

    ends = [
        (a, b)
        for a in range(1, block_size)
        for b in range(1, block_size)
        if (stages == 2 and a + b == block_size) or (stages > 2 and block_size - a - b >= stages - 2)
    ]
    return min((split(pair) for pair in ends), key=loads)


def microbatch_group_size(num_microbatches: int, stages: int) -> int:
    """Micro-batches in a group of the interleaved schedule: the fewest that keep every rank fed.

    The schedule wants groups of at least P, the last one included.

    Raises:
        ValueError: fewer micro-batches than ranks.
    """
    if num_microbatches < stages:
        raise ValueError(
            f"{num_microbatches} micro-batches a rank do not fill a ring of pipeline-model-parallel-size={stages}: "
            f"raise global-batch-size, or lower micro-batch-size or pipeline-model-parallel-size"
        )
    sizes = range(stages, num_microbatches + 1)
    return next(size for size in sizes if num_microbatches % size == 0 or num_microbatches % size >= stages)


def _costs(config: Config, plan: RecursionPlan) -> tuple[float, float, float]:
    flops = layer_flops_per_token(config)
    block = sum(flops[layer.index] for layer in plan.shared) / plan.block_size
    ends = [sum(flops[layer.index] for layer in end) for end in (plan.first, plan.last)]
    return block, ends[0], ends[1] + head_flops_per_token(config)
