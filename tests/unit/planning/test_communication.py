"""Bytes sent in an iteration, by hand; docs/parallelism.md has them measured."""

from __future__ import annotations

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate
from mor_megatron.planning.communication import Traffic, message_bytes, traffic
from mor_megatron.planning.memory import num_microbatches, rank_parameters, trained_parameters
from mor_megatron.planning.stages import pipeline_plan

# The model of benchmarks/parallel.py.
SHAPE = (
    "--num-layers 14 --num-recursions 3 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 "
    "--vocab-size 4096 --seq-length 128 --micro-batch-size 1 --global-batch-size 8"
)
LORA = "--relaxation lora --lora-rank 64"
MIB = 2**20


def sent(flags: str, ranks: int, stage: int = 0) -> Traffic:
    config = validate(read_config(f"{SHAPE} {flags}".split()), ranks)
    pipeline = pipeline_plan(config)
    parameters, trained = (count(config, pipeline, stage) for count in (rank_parameters, trained_parameters))
    return traffic(config, pipeline, stage, parameters, num_microbatches(config, ranks), ranks, trained)


MEASURED = {
    "dp2-zero0": ("--zero-stage 0", 2, 0, {"data": 46.52}),
    "dp2-zero1": ("--zero-stage 1", 2, 0, {"data": 69.78}),
    "dp2-zero2": ("--zero-stage 2", 2, 0, {"data": 209.34}),
    "dp2-zero3": ("--zero-stage 3", 2, 0, {"data": 186.05}),
    "tp2": ("--zero-stage 0 --tensor-model-parallel-size 2", 2, 0, {"tensor": 87.01}),
    "tp2-sp": ("--zero-stage 0 --tensor-model-parallel-size 2 --sequence-parallel", 2, 0, {"tensor": 108.78}),
    "tp2, relaxed": (f"--zero-stage 0 --tensor-model-parallel-size 2 {LORA}", 2, 0, {"tensor": 108.01}),
    "tp2-sp, relaxed": (
        f"--zero-stage 0 --tensor-model-parallel-size 2 --sequence-parallel {LORA}",
        2,
        0,
        {"tensor": 137.66},
    ),
    "pp2": ("--zero-stage 0 --pipeline-model-parallel-size 2", 2, 0, {"pipeline": 7.5, "embedding": 6.0}),
    "pp4, first": ("--zero-stage 0 --pipeline-model-parallel-size 4", 4, 0, {"pipeline": 7.5, "embedding": 6.0}),
    "pp4, second": ("--zero-stage 0 --pipeline-model-parallel-size 4", 4, 1, {"pipeline": 9.0}),
    "pp4, last": ("--zero-stage 0 --pipeline-model-parallel-size 4", 4, 3, {"pipeline": 7.5, "embedding": 6.0}),
    "pp2-dp2": ("--pipeline-model-parallel-size 2", 4, 0, {"pipeline": 3.75, "embedding": 6.0, "data": 39.39}),
}


@pytest.mark.parametrize(("flags", "ranks", "stage", "measured"), MEASURED.values(), ids=MEASURED)
def test_what_real_ranks_sent(flags, ranks, stage, measured):
    counted = sent(flags, ranks, stage)
    for purpose in ("tensor", "pipeline", "embedding", "data"):
        expected = measured.get(purpose, 0.0)
        assert getattr(counted, purpose) / MIB == pytest.approx(expected, rel=0.01), purpose


def test_recomputation_repeats_the_exchanges_of_the_forward_pass():
    flags = "--tensor-model-parallel-size 2 --zero-stage 0"
    row = 8 * 128 * 384 * 4  # of all micro-batches
    once, again = sent(flags, 2).tensor, sent(f"{flags} --recompute-granularity full", 2).tensor
    assert again - once == 14 * 2 * row


def test_frozen_weights_are_gathered_and_not_reduced():
    """Adapters of rank 1 on q, k, v and o: as many numbers a recursion as the four maps have inputs and outputs."""
    flags = "--relaxation lora --lora-rank 1 --lora-targets attention --freeze base --zero-stage"
    trained, everything = 4 * 3 * 4 * 2 * 384, sent(flags.replace("--freeze base", "") + " 0", 2).data / 4
    assert sent(f"{flags} 0", 2).data == 4 * trained
    assert sent(f"{flags} 1", 2).data == 6 * trained
    assert sent(f"{flags} 3", 2).data == 4 * 2 * (trained + everything)  # four micro-batches, half of fp32 each
    assert sent(f"{flags} 1 --pipeline-model-parallel-size 2", 2).embedding == 0.0


def test_messages_shrink_with_the_tokens_that_stay():
    flags = "--routing expert_choice --pipeline-model-parallel-size 2"
    config = validate(read_config(f"{SHAPE} {flags}".split()), 2)
    rows = [size / (128 * 384 * 4) for size in message_bytes(config, pipeline_plan(config), 0)]
    assert rows == pytest.approx([1, 2 / 3, 1 / 3 + 1]), "the residual stream travels in the last chunk"
    back = [size / (128 * 384 * 4) for size in message_bytes(config, pipeline_plan(config), 1)]
    assert back == pytest.approx([1, 2 / 3, 0]), "the last rank ends with the loss"
