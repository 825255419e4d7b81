"""Bytes at the peak of a rank, by hand. `unit/training/test_peak_memory.py` has those of real tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.planning.activations import activations, head_bytes
from mor_megatron.planning.memory import _moments, rank_memory
from mor_megatron.planning.schedule import passes
from mor_megatron.planning.stages import pipeline_plan

SHAPE = "--num-layers 5 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 64 --vocab-size 128"
EXPERT = "--num-recursions 3 --routing expert_choice"


def config_of(flags: str, ranks: int = 1) -> Config:
    return validate(read_config(f"{SHAPE} {flags}".split()), ranks)


def kept(flags: str, ranks: int = 1, stage: int = 0) -> tuple[float, ...]:
    config = config_of(flags, ranks)
    return activations(config, pipeline_plan(config), stage, cuda=True).kept


def test_a_layer_by_hand():
    rows = 2 * 64
    layer = 4 * 32 + 32 + 2 * 32 + 32 + 3 * 96  # residual stream and norms, q, k and v, output, feed-forward
    statistics = 2 + 4  # of norms and softmax, fp32
    assert kept("--micro-batch-size 2") == (5 * rows * 4 * (layer + statistics),)
    assert kept("--micro-batch-size 2 --bf16") == (5 * rows * (2 * layer + 4 * statistics),)
    assert kept("--micro-batch-size 2 --recompute-granularity selective") == (5 * rows * 4 * (layer + 2),)
    assert kept("--micro-batch-size 2 --recompute-granularity full") == (5 * rows * 4 * 32,)
    flags = "--micro-batch-size 2 --recompute-granularity full --recompute-unit recursion"
    assert kept(flags) == (rows * 4 * 32,)


def test_tensor_parallel_ranks_divide_what_is_inside_a_layer_and_with_sequence_parallel_all_of_it():
    whole, inside = kept("--micro-batch-size 2")[0], 5 * 2 * 64 * 4 * (4 * 32 + 3 * 96 + 4)
    assert kept("--micro-batch-size 2 --tensor-model-parallel-size 2", 2) == (whole - inside / 2,)
    assert kept("--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel", 2) == (whole / 2,)


def test_tokens_that_leave_keep_nothing():
    whole = kept("--micro-batch-size 3 --num-recursions 3")
    routed = kept(f"--micro-batch-size 3 {EXPERT}")
    rows, row = 3 * 64, 4 * 32
    layer = whole[1]
    assert routed[1] == pytest.approx(layer * 2 / 3 + rows * row * (1 + 2 / 3))  # candidates, and the output to weigh
    shared = kept(f"--micro-batch-size 3 {EXPERT} --kv-mode sharing")
    assert shared[1] == pytest.approx(routed[1] - rows * 2 / 3 * 2 * row), "no keys and values of its own"


@pytest.mark.parametrize(
    ("flags", "cuda", "norm", "logits"),
    [
        ("--loss-chunk-rows 0", False, 2 * 4 * 32 + 4, 128 * 128 * 4),
        ("--loss-chunk-rows 16", False, 3 * 4 * 32 + 4, 16 * 128 * 4),
        ("--loss-chunk-rows 16 --bf16", False, 3 * 2 * 32 + 4, 16 * 128 * (2 + 4)),  # in fp32 beside their 16 bits
        ("--loss-chunk-rows 16 --bf16", True, 3 * 2 * 32 + 4, 16 * 128 * 2),
        ("--loss-chunk-rows 512 --bf16", True, 3 * 2 * 32 + 4, 128 * 128 * 2),
    ],
)
def test_logits_are_those_of_a_chunk(flags, cuda, norm, logits):
    config = config_of(f"--micro-batch-size 2 {flags}")
    assert head_bytes(config, cuda) == 2 * 64 * norm + logits


def test_gradients_wait_for_the_other_uses_of_their_weights_unless_each_use_adds_its_own():
    flags = "--micro-batch-size 1 --num-recursions 3 --recompute-granularity full"
    layer, vocabulary = 4 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32), 4 * 128 * 32
    plain = [working_of(f"{flags} --zero-stage {zero}{half}") for zero, half in ((2, " --bf16"), (1, " --bf16"))]
    assert plain[0] - plain[1] == layer + vocabulary, "one layer is shared, and the embedding is the head"


def working_of(flags: str) -> float:
    """Bytes that the backward pass of the first recursion adds."""
    config = config_of(flags)
    moments = _moments(config, pipeline_plan(config), 0, 1, cuda=False)
    return next(moment.working for moment in moments if moment.name == "backward pass of recursion 0")


def test_passes_are_those_of_the_schedule():
    config = config_of("--pipeline-model-parallel-size 2 --num-layers 8 --num-recursions 3 --global-batch-size 24", 2)
    pipeline = pipeline_plan(config)
    last = passes(pipeline, 1, 6)
    assert last[:4] == (0, 0, 1, 1)
    assert last[4:8] == (2, ~2, 2, ~2), "two recursions ahead of the first backward pass"
    assert passes(pipeline, 0, 6)[:7] == (0, 0, 1, 1, 2, 2, 0), "two more on the rank before"
    assert sum(1 if step >= 0 else -1 for step in last) == 0


def test_more_stages_ahead_keep_more_micro_batches():
    flags = "--pipeline-model-parallel-size 4 --global-batch-size 64 --micro-batch-size 2"
    config = config_of(f"{flags} --num-layers 4", 4)
    pipeline = pipeline_plan(config)
    layer = activations(config, pipeline, 0, cuda=True).kept[0]
    held = [rank_memory(config, pipeline, stage, 4, cuda=False).peak.activations for stage in range(3)]
    assert held == [4 * layer, 3 * layer, 2 * layer]


def test_offloaded_state_is_not_on_the_device():
    config = config_of("--optimizer-cpu-offload --bf16")
    memory = rank_memory(config, pipeline_plan(config), 0, 1, cuda=False)
    on_device = replace(memory, is_offloaded=False)
    assert on_device.total - memory.total == memory.state.optimizer > 0
