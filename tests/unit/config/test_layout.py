"""Layouts: what is refused and why, and whether the layouts that a refusal suggests can run."""

from __future__ import annotations

import re

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate

MOR = "--num-layers 14 --num-recursions 3 --routing expert_choice --num-attention-heads 4 --hidden-size 64"
"""A block of four layers."""


def run(flags: str, world_size: int) -> Config:
    flags = flags.replace("--tp", "--tensor-model-parallel-size").replace("--pp", "--pipeline-model-parallel-size")
    return validate(read_config(flags.split()), world_size)


# flags, ranks -> what the message must contain: the fault with its values, then the remedy.
REFUSED = {
    "world": (
        f"{MOR} --tp 4",
        6,
        "tensor-model-parallel-size=4 x pipeline-model-parallel-size=1 does not divide a world of 6 ranks",
        r"use TP=2 PP=1 \(DP=3\) or TP=1 PP=1 \(DP=6\) or TP=2 PP=3 \(DP=1\), or a multiple of 4 ranks",
    ),
    "one rank": (
        f"{MOR} --pp 2",
        1,
        "does not divide a world of 1 rank",
        r"use TP=1 PP=1 \(DP=1\), or a multiple of 2",
    ),
    "more stages than layers": (
        f"{MOR} --pp 5",
        5,
        "pipeline-model-parallel-size=5 does not fit a block of 4 layers .num-layers=14, num-recursions=3, mid",
        r"use TP=1 PP=1 \(DP=5\), or --num-layers 17 or more",
    ),
    "more stages than layers without recursion": (
        "--num-layers 3 --pp 4",
        4,
        "pipeline-model-parallel-size=4 does not fit a block of 3 layers",
        "--num-layers 4 or more",
    ),
    "number of stages": (
        f"{MOR} --pp 2 --pipeline-layers 2 1 1",
        2,
        "pipeline-layers=2 1 1 has 3 values for pipeline-model-parallel-size=2",
        "--pipeline-layers 2 2, or leave it out",
    ),
    "sum of stages": (
        f"{MOR} --pp 3 --pipeline-layers 2 1 2",
        3,
        "pipeline-layers=2 1 2 adds up to 5, and the block has 4 layers",
        "--pipeline-layers 2 1 1",
    ),
    "empty stage": (
        f"{MOR} --pp 2 --pipeline-layers 4 0",
        2,
        "pipeline-layers=4 0 leaves a rank without a layer",
        "--pipeline-layers 2 2",
    ),
    "overlap without a ring": (
        "--num-layers 8 --pp 2 --overlap-p2p-comm on",
        2,
        "overlap-p2p-comm=on needs a ring, and pipeline-model-parallel-size=2 is an ordinary pipeline",
        r"use TP=1 PP=1 \(DP=2\) or TP=2 PP=1 \(DP=1\), or --overlap-p2p-comm auto",
    ),
    "heads": (
        f"{MOR} --tp 3 --ffn-hidden-size 96",
        6,
        "tensor-model-parallel-size=3 does not divide num-attention-heads=4",
        r"use TP=2 PP=1 \(DP=3\) .*, or a num-attention-heads that is a multiple of 3",
    ),
    "fewer groups than ranks": (
        f"{MOR} --tp 4 --group-query-attention --num-query-groups 2",
        4,
        "tensor-model-parallel-size=4 does not divide num-query-groups=2",
        r"use TP=2 PP=1 \(DP=2\)",
    ),
    "feed-forward": (
        f"{MOR} --tp 2 --ffn-hidden-size 177",
        2,
        "tensor-model-parallel-size=2 does not divide ffn-hidden-size=177",
        "a ffn-hidden-size that is a multiple of 2",
    ),
    "sequence": (
        f"{MOR} --tp 2 --sequence-parallel --seq-length 127",
        2,
        "tensor-model-parallel-size=2 does not divide seq-length=127, which sequence-parallel cuts",
        "a seq-length that is a multiple of 2",
    ),
    "ZeRO-2 in a pipeline": (
        f"{MOR} --pp 2 --zero-stage 2",
        4,
        "zero-stage=2 .*pipeline-model-parallel-size=2",
        r"use TP=1 PP=1 \(DP=4\) or TP=2 PP=1 \(DP=2\) .*--zero-stage 0 or 1",
    ),
    "ZeRO-3 in a pipeline": (f"{MOR} --pp 2 --zero-stage 3", 2, "zero-stage=3", "--zero-stage 0 or 1"),
    "fp16 in a pipeline": (f"{MOR} --pp 2 --fp16", 2, "fp16=True .*pipeline-model-parallel-size=2", "or --bf16"),
    "micro-batches of a ring": (
        f"{MOR} --pp 4 --micro-batch-size 2 --global-batch-size 12",
        8,
        "global-batch-size=12 gives a rank 3 micro-batches .micro-batch-size=2, 2 data-parallel ranks.*"
        "pipeline-model-parallel-size=4",
        "use --micro-batch-size 1, which keeps the global batch, or --global-batch-size 16 or more",
    ),
    "part of a micro-batch in a ring": (
        f"{MOR} --pp 2 --micro-batch-size 4 --global-batch-size 3",
        2,
        "global-batch-size=3 is not a multiple of micro-batch-size=4 x 1 data-parallel ranks",
        "use --micro-batch-size 1, which keeps the global batch, or --global-batch-size 8$",
    ),
}


@pytest.mark.parametrize(("flags", "ranks", "fault", "remedy"), REFUSED.values(), ids=REFUSED)
def test_refused_with_reason_and_remedy(flags, ranks, fault, remedy):
    with pytest.raises(ValueError, match=f"{fault}.*{remedy}") as error:
        run(flags, ranks)
    message = str(error.value)
    assert "\n" not in message
    for tp, pp, dp in re.findall(r"TP=(\d+) PP=(\d+) \(DP=(\d+)\)", message):
        assert int(tp) * int(pp) * int(dp) == ranks
        kept = re.sub(r"--(tp|pp) \d+|--pipeline-layers( \d+)+", "", flags)
        run(f"{kept} --tp {tp} --pp {pp}", ranks)


ACCEPTED = {
    "tensor": (f"{MOR} --tp 4", 8),
    "sequence": (f"{MOR} --tp 2 --sequence-parallel --check-routing-consistency 10", 2),
    "ring": (f"{MOR} --pp 4", 4),
    "uneven ring": (f"{MOR} --pp 2 --pipeline-layers 3 1 --global-batch-size 8", 2),
    "ring of three micro-batches a group": (f"{MOR} --pp 2 --micro-batch-size 2 --global-batch-size 6", 2),
    "all at once": (f"{MOR} --tp 2 --sequence-parallel --pp 2", 16),
    "ordinary pipeline, one micro-batch": ("--pp 4", 4),
    "ZeRO-3": (f"{MOR} --tp 2 --zero-stage 3", 4),
    "fp16": (f"{MOR} --tp 2 --fp16", 4),
}


@pytest.mark.parametrize(("flags", "ranks"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_without_a_word(flags, ranks, caplog):
    config = run(flags, ranks)
    assert validate(config, ranks) == config
    assert caplog.text == ""


def test_the_default_global_batch_fills_the_ring():
    assert run(f"{MOR} --pp 4 --micro-batch-size 2", 8).training.global_batch_size == 2 * 2 * 4
    assert run("--pp 4 --micro-batch-size 2", 8).training.global_batch_size == 2 * 2


def test_sequence_parallelism_of_one_rank_is_off():
    assert run("--sequence-parallel", 2).parallel.sequence_parallel is False
    assert run("--sequence-parallel --tp 2", 2).parallel.sequence_parallel is True
