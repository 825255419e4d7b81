"""The split of layers over pipeline ranks: every virtual layer once, ends at the ends, least work for the slowest."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from mor_megatron.config.schema import Config, ModelConfig, ParallelConfig, RecursionConfig
from mor_megatron.config.validate import validate
from mor_megatron.planning.stages import balanced_split, microbatch_group_size, pipeline_plan

STRATEGIES = ["cycle", "middle_cycle", "sequence", "middle_sequence"]


def plan(strategy: str, count: int, stages: int, block: int = 6, split: tuple[int, ...] | None = None):
    ends = 2 if strategy.startswith("middle") and count > 1 else 0
    config = Config(
        model=ModelConfig(num_layers=ends + block * count, vocab_size=64),
        recursion=RecursionConfig(num_recursions=count, sharing_strategy=strategy),
    )
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, pipeline_layers=split)
    return pipeline_plan(replace(validate(config), parallel=parallel))


@pytest.mark.parametrize(("strategy", "count", "stages"), product(STRATEGIES, [1, 2, 3], [1, 2, 3, 4, 6]))
def test_every_virtual_layer_runs_once_in_order(strategy, count, stages):
    pipeline = plan(strategy, count, stages)
    turns = product(range(pipeline.num_chunks), range(stages))
    order = [layer for turn, rank in turns for layer in pipeline.layers(rank, turn)]
    assert order == list(pipeline.plan.layers)
    ring = stages > 1 and count > 1 and "cycle" in strategy
    assert pipeline.num_chunks == (count if ring else 1)
    held = [layer for rank in range(stages) for layer in pipeline.physical_layers(rank)]
    assert sorted(held) == list(range(pipeline.plan.num_physical_layers)), "a unique layer is on one rank"


def test_a_split_by_hand_is_obeyed():
    pipeline = plan("middle_cycle", 2, 3, split=(1, 4, 1))
    assert [len(pipeline.physical_layers(rank)) for rank in range(3)] == [1 + 1, 4, 1 + 1]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 1.0), (0.0, 2.5), (1.0, 7.0)])
def test_no_split_has_a_faster_slowest_rank(stages, ends):
    block = 7

    def slowest(split: tuple[int, ...]) -> float:
        loads = list(split)
        loads[0] += ends[0]
        loads[-1] += ends[1]
        return max(loads)

    chosen = balanced_split(1.0, *ends, block, stages)
    assert len(chosen) == stages
    assert sum(chosen) == block
    splits = [s for s in product(range(1, block + 1), repeat=stages) if sum(s) == block]
    assert slowest(chosen) == min(slowest(split) for split in splits)


def test_a_large_head_takes_layers_from_its_rank():
    small = pipeline_plan(_with_vocabulary(64))
    large = pipeline_plan(_with_vocabulary(200_000))
    assert small.block_layers == (3, 3)
    assert large.block_layers[1] < 3


def _with_vocabulary(size: int) -> Config:
    config = Config(
        model=ModelConfig(num_layers=20, vocab_size=size),
        recursion=RecursionConfig(num_recursions=3, routing="expert_choice"),
    )
    return replace(validate(config), parallel=ParallelConfig(pipeline_model_parallel_size=2))


@pytest.mark.parametrize(
    ("count", "stages", "group"), [(8, 2, 2), (7, 2, 4), (5, 2, 3), (4, 4, 4), (9, 4, 5), (6, 4, 6)]
)
def test_groups_are_the_smallest_that_keep_every_rank_fed(count, stages, group):
    assert microbatch_group_size(count, stages) == group
    assert count % group == 0 or count % group >= stages


def test_too_few_micro_batches_are_refused():
    with pytest.raises(ValueError, match=r"3 micro-batches a rank do not fill a ring of .*=4: raise global-batch-size"):
        microbatch_group_size(3, 4)


def test_idle_share():
    assert plan("middle_cycle", 3, 4, block=4).idle_share(8) == pytest.approx(3 / (8 * 3 + 3))
    assert plan("middle_sequence", 3, 4, block=4).idle_share(8) == pytest.approx(3 / (8 + 3))
