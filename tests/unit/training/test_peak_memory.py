"""The peak that planning/memory.py predicts, compared with the tensors of a real iteration."""

from __future__ import annotations

import plan
import pytest
import torch
from live_bytes import LiveBytes
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.config.cli import read_config
from mor_megatron.config.schema import Config
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.huggingface.teacher import load_teacher
from mor_megatron.huggingface.teacher_settings import teacher_settings
from mor_megatron.model.mor_model import build_model
from mor_megatron.planning.memory import rank_memory
from mor_megatron.planning.stages import pipeline_plan
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import train_step

SHAPE = "--num-layers 5 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 64 --vocab-size 128"
BATCH = "--micro-batch-size 4 --global-batch-size 8 --max-position-embeddings 64"
EXPERT = "--num-recursions 3 --routing expert_choice"
FROZEN = f"{EXPERT} --relaxation lora --lora-rank 12 --freeze base --vocab-size 4096"


@pytest.mark.parametrize(
    "flags",
    [
        "--zero-stage 0",
        "--zero-stage 1 --bf16",
        f"--zero-stage 0 --bf16 {EXPERT}",
        f"--zero-stage 0 {EXPERT} --recompute-granularity full --recompute-unit recursion",
        f"--zero-stage 0 {EXPERT} --relaxation lora --lora-rank 12 --lora-alpha 6 --recursion-norms",
        f"--zero-stage 0 {FROZEN}",
        f"--zero-stage 0 --bf16 {FROZEN}",
        f"--zero-stage 1 --bf16 {FROZEN} --untie-embeddings-and-output-weights",
    ],
)
def test_the_peak_of_a_real_iteration(process_group, flags):
    config = validate(read_config(f"{SHAPE} {flags} {BATCH}".split()))
    assert rank_memory(config, pipeline_plan(config), 0, 1, cuda=False).total == pytest.approx(peak(config), rel=0.05)


@pytest.mark.parametrize("flags", ["--loss-chunk-rows 16", "--bf16"])
def test_the_peak_beside_a_teacher(process_group, tmp_path, flags):
    """Of about the model's size, and another shape: either its forward pass or the comparison is the peak."""
    shape = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    words = f"{SHAPE} {flags} {BATCH} {EXPERT} --zero-stage 0 --distill-from {tmp_path}".split()
    config = validate(read_config(words))
    planned = rank_memory(config, pipeline_plan(config, teacher_settings(config)), 0, 1, cuda=False)
    assert planned.total == pytest.approx(peak(config), rel=0.05)


def peak(config: Config) -> int:
    """Bytes of all tensors."""
    tokens = torch.randint(128, (4, 64))
    with LiveBytes() as live:
        model = build_model(config)
        model.distillation = load_teacher(model, config)
        engine = build_engine(model, config)
        engine.module.train()
        for iteration in (1, 2):
            live.reset_peak()
            train_step(engine, iter([Batch(tokens, tokens)] * 2), config, iteration, 1e-3)
    return live.peak


def test_every_line_of_the_benchmark_is_a_run(tmp_path):
    buckets = tmp_path / "buckets.json"
    buckets.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    for ranks, flags in [*plan.LAYOUTS.values(), *plan.PRESETS.values(), *plan.TIMED.values()]:
        config = plan.build_config(ranks, flags, buckets)
        pipeline = pipeline_plan(config)
        memory = [rank_memory(config, pipeline, stage, ranks, cuda=False) for stage in range(pipeline.num_stages)]
        assert all(one.total > one.state.total > 0 for one in memory)
