"""--dry-run: the plan, the layout and its numbers, without a process group."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mor_megatron.config.cli import parse_config, read_config
from mor_megatron.config.validate import validate
from mor_megatron.distributed.launch import launched_world_size
from mor_megatron.planning.report import describe_layout, dry_run, stage_work
from mor_megatron.planning.stages import pipeline_plan

MOR = (
    "--num-layers 14 --num-recursions 3 --routing expert_choice --hidden-size 64 --ffn-hidden-size 176 --seq-length 128"
)


def describe(flags: str, ranks: int) -> str:
    return describe_layout(validate(read_config(f"{flags} --vocab-size 1000".split()), ranks), ranks, cuda=False)


def test_the_ring_of_four_processes():
    flags = f"{MOR} --pipeline-model-parallel-size 2 --pipeline-layers 3 1 --global-batch-size 32 --bf16"
    lines = describe(flags, 4).splitlines()
    assert lines[0] == "layout: 4 ranks = TP 1 x PP 2 x DP 2, ZeRO 1, bf16"
    layer = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
    first, last = 1024 * 64 + 3 * 64 + 4 * layer, 2 * layer + 64 + 1024 * 64
    assert re.match(rf"0-1 +embedding, routers, layers 0-3 +{first:,} ", lines[2])
    assert re.match(rf"2-3 +layers 4-5, head \(copy of the embedding\) +{last:,} ", lines[3])
    assert lines[4].startswith("split: 3 + 1 of the block's 4 layers, as given; stage 0 has ")
    assert lines[5] == "batch: 32 sequences of 128 tokens = 4 a micro-batch x 4 micro-batches x 2 data-parallel ranks"
    assert lines[6] == (
        "schedule: ring, 3 virtual stages a rank (one a recursion), micro-batches in groups of 2; "
        "a rank waits 7.7% of the time = (2 - 1) / (4 x 3 + 2 - 1)"
    )


def test_one_process():
    lines = describe(MOR, 1).splitlines()
    assert lines[0] == "layout: 1 rank = TP 1 x PP 1 x DP 1, ZeRO 1, fp32"
    assert re.match(r"0 +embedding, routers, layers 0-5, head \(the embedding\) +\d", lines[2])
    assert lines[-1] == "schedule: no pipeline, micro-batches one after another"


def test_what_recursions_differ_by():
    lines = describe(f"{MOR} --relaxation lora --lora-rank 8 --lora-recursions all_but_first --recursion-embedding", 1)
    maps = 4 * (64 + 64) + 3 * (64 + 176)  # inputs and outputs
    assert lines.splitlines()[3] == (
        "recursions differ by adapters of rank 8 on all linear maps (none in the first), a vector added at their "
        f"start: {4 * 2 * 8 * maps + 3 * 64:,} parameters"
    )
    assert "recursions differ" not in describe(MOR, 1)


def test_a_teacher_stands_beside_the_head():
    flags = f"{MOR} --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --global-batch-size 32 --bf16"
    config = validate(read_config(f"{flags} --vocab-size 1000".split()), 8)
    shape = "--num-layers 4 --hidden-size 96 --ffn-hidden-size 256 --vocab-size 1000"
    dense = validate(read_config(shape.split()))
    alone, taught = (describe_layout(config, 8, cuda=False, teacher=x).splitlines() for x in (None, dense))
    layer = 4 * 96 * 96 + 3 * 96 * 256
    first, last = (re.split("  +", line) for line in taught[2:4])
    assert re.split("  +", taught[1])[7] == "teacher"
    assert first[7] == "0.00 MiB"
    assert last[7] == f"{2 * ((1024 * 96 + 4 * layer) / 2 + 4 * 2 * 96 + 96) / 2**20:.2f} MiB"
    assert float(last[-1][:-1]) > float(re.split("  +", alone[3])[-1][:-1]), "its share of the work"
    assert taught[-3] == (
        f"teacher: {1000 * 96 + 4 * (layer + 2 * 96) + 96:,} parameters on ranks 4-7, divided by TP 2 alone; "
        f"{2 * (1000 * 96 + 4 * (layer + 128 * 96)) / 1e6:.1f} MFLOP a token forward"
    )


def test_an_ordinary_pipeline():
    lines = describe("--pipeline-model-parallel-size 2 --global-batch-size 16", 2).splitlines()
    assert (
        lines[-1] == "schedule: one forward, one backward; a rank waits 20.0% of the time = (2 - 1) / (4 x 1 + 2 - 1)"
    )


def test_the_default_split_is_the_best_of_all_for_the_slowest_rank():
    common = f"{MOR} --pipeline-model-parallel-size 2 --vocab-size 30000"
    config = validate(read_config(common.split()), 2)
    slowest = {}
    for first in (1, 2, 3):
        given = validate(read_config(f"{common} --pipeline-layers {first} {4 - first}".split()), 2)
        slowest[first, 4 - first] = max(stage_work(given, pipeline_plan(given)))
    chosen = pipeline_plan(config)
    assert chosen.block_layers == min(slowest, key=slowest.get)
    assert sum(stage_work(config, chosen)) == pytest.approx(1.0)
    assert chosen.block_layers[1] < chosen.block_layers[0], "a head of 30,000 words weighs more than a layer"


@pytest.mark.parametrize(("world_size", "shown"), [(None, "2 ranks = TP 1 x PP 2 x DP 1"), ("8", "8 ranks")])
def test_world_size_is_the_launchers_or_one_copy_of_the_model(monkeypatch, capsys, world_size, shown):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    flags = f"{MOR} --pipeline-model-parallel-size 2 --vocab-size 1000 --dry-run"
    with pytest.raises(SystemExit) as stop:
        parse_config(flags.split(), launched_world_size, dry_run)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("middle_cycle, Nr=3: 14 virtual layers on 6 unique ones (block of 4)\n")
    assert f"layout: {shown}" in printed


REFUSED = {
    "no vocabulary": (f"{MOR}", "vocab-size is not set: give it, or --tokenizer-type"),
    "no layout": (f"{MOR} --vocab-size 100 --pipeline-model-parallel-size 9", "does not fit a block of 4 layers"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line_and_exit_code_2(monkeypatch, capsys, flags, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stop:
        parse_config([*flags.split(), "--dry-run"], launched_world_size, dry_run)
    assert stop.value.code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_it_does_not_wait_for_megatron_and_deepspeed():
    program = (
        "import runpy, sys; sys.argv = ['pretrain_mor.py', '--dry-run', '--vocab-size', '100']\n"
        "try: runpy.run_path('pretrain_mor.py', run_name='__main__')\n"
        "finally: assert not {'megatron', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    process = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "layout: 1 rank" in process.stdout
