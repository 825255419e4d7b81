"""Which layouts fit a model and a number of ranks; the reason when one does not, and the nearest that do.

Everything here is arithmetic on settings, so that a layout is refused before any process group exists.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mor_megatron.config.schema import Config

Problem = tuple[str, str]
"""Why something is refused, and which setting would help, to be read after "use"."""


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that process different sequences: what tensor and pipeline parallelism leave of the world."""
    parallel = config.parallel
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def check_layout(config: Config, world_size: int) -> None:
    """Refuse a layout that cannot run.

    Args:
        config: effective depth, head width and Nr already resolved; `global_batch_size` may still be None.
        world_size: ranks of the run, >= 1.
    Raises:
        ValueError: the reason in one line, then what to change: the nearest layouts of as many ranks, or a setting.
    """
    problem = _layout(config, world_size)
    if problem is None:
        return
    reason, remedy = problem
    near = " or ".join(
        f"TP={tp} PP={pp} (DP={world_size // (tp * pp)})" for tp, pp in nearest_layouts(config, world_size)
    )
    raise ValueError(f"{reason}: use {near + ', or ' if near else ''}{remedy}")


def check_batch(config: Config, world_size: int) -> None:
    """Refuse a global batch that a layout, itself sound, cannot process.

    Raises:
        ValueError: the reason in one line, then the global batch sizes that work.
    """
    problem = _batch(config, world_size)
    if problem is not None:
        reason, remedy = problem
        raise ValueError(f"{reason}: use {remedy}")


def nearest_layouts(config: Config, world_size: int, count: int = 3) -> list[tuple[int, int]]:
    """Tensor- and pipeline-parallel sizes that would run with all other settings as they are.

    Returns:
        At most `count` pairs; nearest first, in factors of two away from the sizes asked for.
    """
    wanted = config.parallel

    def distance(sizes: tuple[int, int]) -> tuple[float, int, int]:
        tp, pp = sizes
        steps = abs(math.log2(tp / wanted.tensor_model_parallel_size))
        steps += abs(math.log2(pp / wanted.pipeline_model_parallel_size))
        return steps, pp, tp

    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    fitting = [(tp, pp) for tp in divisors for pp in divisors if fits(_resized(config, tp, pp), world_size)]
    return sorted(fitting, key=distance)[:count]


def _resized(config: Config, tp: int, pp: int) -> Config:
    parallel = config.parallel
    layers = parallel.pipeline_layers if pp == parallel.pipeline_model_parallel_size else None
    return replace(
        config,
        parallel=replace(
            parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_layers=layers
        ),
    )


def _layout(config: Config, world_size: int) -> Problem | None:
    """What stands against a layout, or None."""
    for check in (_stages, _tensor_parallel, _pipeline_only):
        problem = check(config)
        if problem is not None:
            return problem
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        return (
            f"tensor-model-parallel-size={tp} x pipeline-model-parallel-size={pp} does not divide a world of "
            f"{world_size} {'rank' if world_size == 1 else 'ranks'}",
            f"a multiple of {tp * pp} ranks",
        )
    return None


def fits(config: Config, world_size: int) -> bool:
    """Whether `check_layout` and `check_batch` would let a layout pass."""
    return _layout(config, world_size) is None and _dealt(config, world_size) is None


def _stages(config: Config) -> Problem | None:
    plan, parallel = config.plan, config.parallel
    stages, layers, block = parallel.pipeline_model_parallel_size, parallel.pipeline_layers, plan.block_size
    if block < stages:
        count, strategy = plan.num_recursions, plan.strategy
        depth = len(plan.first) + len(plan.last) + -(-stages * len(plan.shared) // block)  # as often as they run now
        return (
            f"pipeline-model-parallel-size={stages} does not fit a block of {block} "
            f"{'layer' if block == 1 else 'layers'} (num-layers={plan.num_layers}, num-recursions={count}, {strategy})",
            f"--num-layers {depth} or more",
        )
    if stages > 1 and not plan.fits_pipeline:
        reason = f"sharing-strategy={plan.strategy} comes back to an earlier layer within a pass over the ranks of "
        return f"{reason}pipeline-model-parallel-size={stages}", "another --sharing-strategy"
    if stages == 1 or layers is None:
        return None
    shown = f"pipeline-layers={' '.join(map(str, layers))}"
    even = " ".join(str(block // stages + (rank < block % stages)) for rank in range(stages))
    if len(layers) != stages:
        reason = f"{shown} has {len(layers)} values for pipeline-model-parallel-size={stages}"
    elif min(layers) < 1:
        reason = f"{shown} leaves a rank without a layer"
    elif sum(layers) != block:
        reason = f"{shown} adds up to {sum(layers)}, and the block has {block} layers"
    else:
        return None
    return reason, f"--pipeline-layers {even}, or leave it out for a balanced split"


def _tensor_parallel(config: Config) -> Problem | None:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    divided = [
        ("num-attention-heads", model.num_attention_heads),
        # Fewer groups than ranks would need copies of a head's keys, whose gradients nobody adds up.
        ("num-query-groups", model.key_value_heads),
        ("ffn-hidden-size", model.ffn_hidden_size),
    ]
    if config.parallel.sequence_parallel:
        divided.append(("seq-length", config.data.seq_length))
    for name, value in divided:
        if value % tp:
            reason = f"tensor-model-parallel-size={tp} does not divide {name}={value}"
            if name == "seq-length":
                reason += ", which sequence-parallel cuts"
            return reason, f"a {name} that is a multiple of {tp}"
    return None


def _pipeline_only(config: Config) -> Problem | None:
    """What does not go together with a pipeline."""
    stages, training = config.parallel.pipeline_model_parallel_size, config.training
    if stages == 1:
        return None
    if training.zero_stage > 1:
        return (
            f"zero-stage={training.zero_stage} reduces gradients in every backward pass and cannot wait for the "
            f"schedule of pipeline-model-parallel-size={stages}",
            "--zero-stage 0 or 1",
        )
    if config.parallel.overlap_p2p_comm == "on" and not config.is_ring:
        return (
            f"overlap-p2p-comm=on needs a ring, and pipeline-model-parallel-size={stages} is an ordinary pipeline with "
            "num-recursions=1 or without cycle sharing",
            "--overlap-p2p-comm auto",
        )
    if training.fp16:
        return (
            f"fp16=True scales the loss inside DeepSpeed's backward pass, which the schedule of "
            f"pipeline-model-parallel-size={stages} does not run",
            "--bf16",
        )
    return None


def _batch(config: Config, world_size: int) -> Problem | None:
    """Whether every global batch can be dealt to the ranks, and fills a ring."""
    problem = _dealt(config, world_size)
    if problem is None:
        return None
    # The recipe's batch first: whoever has more ranks than its author wants the same run, faster.
    for size in range(config.training.micro_batch_size - 1, 0, -1):
        if _dealt(replace(config, training=replace(config.training, micro_batch_size=size)), world_size) is None:
            return problem[0], f"--micro-batch-size {size}, which keeps the global batch, or {problem[1]}"
    return problem


def _dealt(config: Config, world_size: int) -> Problem | None:
    training, stages = config.training, config.parallel.pipeline_model_parallel_size
    ranks = data_parallel_size(config, world_size)
    unit, batch = training.micro_batch_size * ranks, default_batch(config, world_size)
    cut = f"micro-batch-size={training.micro_batch_size} x {ranks} data-parallel ranks"
    if batch % unit:
        below, least = batch - batch % unit, unit * (stages if config.is_ring else 1)
        near = " or ".join(map(str, sorted({max(size, least) for size in (below, below + unit)})))
        return f"global-batch-size={batch} is not a multiple of {cut}", f"--global-batch-size {near}"
    ramp = training.rampup_batch_size
    shown = f"global-batch-size={batch}"
    if ramp is not None:
        shown = f"rampup-batch-size={' '.join(map(str, ramp))}"
        if ramp[0] % unit or ramp[1] % unit:
            return (
                f"{shown} makes batches that are not multiples of {cut}",
                f"START and INCREMENT in multiples of {unit}",
            )
        batch = ramp[0]
    if config.is_ring and batch // unit < stages:
        return (
            f"{shown} gives a rank {batch // unit} micro-batches (micro-batch-size={training.micro_batch_size}, "
            f"{ranks} data-parallel ranks), too few to fill a ring of pipeline-model-parallel-size={stages}",
            f"{'--global-batch-size' if ramp is None else 'a START of'} {stages * unit} or more",
        )
    return None


def default_batch(config: Config, world_size: int) -> int:
    """`global_batch_size`, or the smallest that gives every rank a micro-batch and fills a ring."""
    training, parallel = config.training, config.parallel
    fewest = parallel.pipeline_model_parallel_size if config.is_ring else 1
    return training.global_batch_size or training.micro_batch_size * data_parallel_size(config, world_size) * fewest
