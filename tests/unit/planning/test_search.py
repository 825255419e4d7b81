"""The planner: its candidates, its order, what it says when nothing fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate, validate_model
from mor_megatron.planning.accounting import executed_flops_per_token, layer_work
from mor_megatron.planning.listing import listing
from mor_megatron.planning.machines import MACHINES, load_machine
from mor_megatron.planning.memory import rank_memory
from mor_megatron.planning.report import describe_layout
from mor_megatron.planning.search import FREE, Candidate, search, usable_bytes, worthwhile
from mor_megatron.planning.stages import pipeline_plan
from mor_megatron.planning.step_time import stage_time
from mor_megatron.planning.teacher import beside

SHAPE = (
    "--num-layers 14 --num-recursions 3 --routing expert_choice --hidden-size 512 --ffn-hidden-size 1408 --seq-length "
    "1024 --num-attention-heads 8 --vocab-size 8192 --global-batch-size 64 --bf16"
)
LARGE = (
    "--num-layers 80 --num-recursions 3 --routing expert_choice --hidden-size 8192 --ffn-hidden-size 28672 --bf16 "
    "--num-attention-heads 64 --group-query-attention --num-query-groups 8 --vocab-size 49152 --seq-length 4096 "
    "--max-position-embeddings 4096 --global-batch-size 1024"
)
H100 = MACHINES["H100"]
CHOSEN = ("zero_stage", "micro_batch_size", "recompute_granularity", "recompute_unit")


def model(flags: str = SHAPE) -> Config:
    return validate_model(read_config(flags.split()))


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    return search(model(), 8, H100)


def test_layouts_run_and_come_fastest_first(found):
    for one in found[:: len(found) // 20]:
        again = validate(read_config(f"{SHAPE} {one.flags()}".split()), 8)
        assert again.parallel == one.config.parallel
        assert [getattr(again.training, name) for name in CHOSEN] == [
            getattr(one.config.training, name) for name in CHOSEN
        ]
    speeds = [one.tokens_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True)
    kinds = {(one.config.parallel.tensor_model_parallel_size, one.config.training.zero_stage) for one in found}
    assert {(1, 3), (2, 0), (4, 1), (8, 2)} <= kinds
    assert {one.config.parallel.pipeline_model_parallel_size for one in found} == {1, 2, 4}


def test_a_setting_on_the_command_line_stays(found):
    fixed = search(model(f"{SHAPE} --zero-stage 2 --micro-batch-size 2"), 8, H100, frozenset({"zero_stage"}))
    assert {one.config.training.zero_stage for one in fixed} == {2}
    assert {one.flags() for one in fixed} == {one.flags() for one in found if "--zero-stage 2" in one.flags()}


def test_more_memory_never_leaves_fewer_layouts(found):
    counts = [sum(one.memory.total <= gb * 1e9 for one in found) for gb in (1, 2, 4, 8, 16, 1000)]
    assert counts == sorted(counts)
    assert counts[0] < counts[2] < counts[-1] == len(found)


def test_a_higher_zero_stage_holds_no_more_state(found):
    states: dict[tuple, list[int]] = {}
    for one in sorted(found, key=lambda one: one.config.training.zero_stage):
        training = replace(one.config.training, zero_stage=0)
        states.setdefault((one.config.parallel, training), []).append(one.memory.state.total)
    assert all(held == sorted(held, reverse=True) for held in states.values())
    assert max(map(len, states.values())) == 4


def test_no_listed_layout_is_slower_and_larger_than_its_like(found):
    kept = worthwhile(found)
    assert 1 < len(kept) < len(found) / 2
    assert kept[0] is found[0]
    assert min(one.memory.total for one in kept) * 0.95 <= min(one.memory.total for one in found)


def test_70b_on_1024_ranks():
    large = search(model(LARGE), 1024, H100)
    fitting = [one for one in large if one.memory.total <= usable_bytes(H100)]
    assert 100 < len(fitting) < len(large) < 2000, "few enough to be listed in seconds"
    assert fitting[0].config.parallel.tensor_model_parallel_size > 1


def test_the_dry_run_reads_the_same_memory(found):
    one = next(one for one in found if one.config.parallel.pipeline_model_parallel_size == 1)
    shown = describe_layout(validate(read_config(f"{SHAPE} {one.flags()}".split()), 8), 8, cuda=True)
    assert f"{one.memory.total / 2**30:.2f} GiB" in shown.splitlines()[2]


def test_a_teacher_takes_memory_and_time(found):
    dense = model("--num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --vocab-size 8192 --bf16")
    fixed = frozenset(FREE)
    for words in ("", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"):
        config = model(f"{SHAPE} {words}")
        (alone,), (taught,) = (search(config, 8, H100, fixed, teacher) for teacher in (None, dense))
        if taught.config.parallel.pipeline_model_parallel_size == 1:  # else the first stage is the fullest
            assert taught.memory.total > alone.memory.total + taught.memory.teacher > alone.memory.total
        flops = executed_flops_per_token(beside(config, dense)) * 64 * 1024
        assert taught.flops - alone.flops == pytest.approx(flops)
        tp, dp = config.parallel.tensor_model_parallel_size, taught.data_parallel_size
        longer = taught.time.total - alone.time.total
        assert longer > flops / (tp * dp) / (H100.bf16_tflops * 1e12)
        assert longer < alone.time.total
    assert "teacher" in listing([taught], 8, H100, 1).splitlines()[3]
    assert "teacher" not in listing([alone], 8, H100, 1)


def test_the_fullest_stage_counts(found):
    one = next(one for one in found if one.config.parallel.pipeline_model_parallel_size == 4)
    pipeline = pipeline_plan(one.config)
    stages = [rank_memory(one.config, pipeline, stage, 8, cuda=True).total for stage in range(4)]
    assert one.memory.total == max(stages)


def test_the_first_recursion_fills_and_drains_a_ring(found):
    one = next(one for one in found if one.config.parallel.pipeline_model_parallel_size == 4)
    time = stage_time(one.config, pipeline_plan(one.config), 1, H100, 0.0, layer_work(one.config))
    assert time.chunks[0] > time.chunks[1] > time.chunks[2], "tokens leave"
    assert one.time.idle >= 3 * time.chunks[0]


def test_nothing_fits(found):
    message = (
        re.escape("none of ") + r"\d+ layouts fits 8 x 0\.02 GB \(H100\): the smallest needs .* GB too much \(--ten"
    )
    with pytest.raises(ValueError, match=message):
        listing(found, 8, replace(H100, memory_gb=4.02), 10)


def test_nothing_runs():
    with pytest.raises(ValueError, match="gpus=7 cannot be divided among this model and batch"):
        listing(search(model(), 7, H100), 7, H100, 10)


def test_a_machine_of_ones_own(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("base: A100\nlink-gbs: 100\nnode-size: 4\n")
    machine = load_machine(str(file), ["memory-gb=40"])
    assert (machine.name, machine.bf16_tflops, machine.link_gbs) == ("cluster", 312, 100)
    assert (machine.node_size, machine.memory_gb) == (4, 40)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("H900", [], "machine=H900 is neither known nor a file: use A100"),
        ("H100", ["links=3"], "links is no property of a machine: use name, memory-gb"),
        ("H100", ["link-gbs=fast"], "link-gbs=fast is not a number above 0"),
        ("H100", ["link-gbs"], "override 'link-gbs' is no field=value"),
    ],
)
def test_what_is_wrong_with_a_machine(name, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_machine(name, overrides)
