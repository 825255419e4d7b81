"""Records, the log line in Megatron-LM's format, and metrics.jsonl."""

import json
import math
import re
from datetime import datetime

import pytest

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.planning.accounting import executed_flops_per_token
from mor_megatron.training.metrics import log_line, training_record, validation_line
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import StepReport

ROUTING = {"aux_loss": 2.0, "tokens_per_recursion_0": 1.0, "tokens_per_recursion_1": 0.5, "mean_depth": 1.5}
CONFIG = validate(
    Config(
        model=ModelConfig(num_layers=6, hidden_size=32, vocab_size=100),
        recursion=RecursionConfig(num_recursions=2, routing="expert_choice"),
        data=DataConfig(seq_length=64),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=2),
    )
)


def record(iteration=10, loss=7.125, norm=1.25, seconds=0.5, routing=ROUTING, teacher=None):
    progress = Progress(iteration, 8 * iteration, skipped_iterations=3, nan_iterations=1)
    report = StepReport(loss, norm, True, (), routing)
    shared = {"lr": 3e-3, "seconds": seconds, "ranks": 2, "peak_tflops": 2e-3}
    return training_record(CONFIG, progress, report, **shared, teacher=teacher)


def test_log_line_has_megatrons_fields_in_megatrons_order():
    line = log_line([record()], last_iteration=100, now=datetime(2026, 1, 2, 3, 4, 5))
    number = r"\d+\.\d+(?:E[+-]\d\d)?"
    pattern = (
        r"^ \[2026-01-02 03:04:05\] iteration +10/ +100 \| consumed samples: +80 \| "
        rf"elapsed time per iteration \(ms\): 500\.0 \| throughput per GPU \(TFLOP/s/GPU\): ({number}) \| "
        r"learning rate: 3\.000000E-03 \| global batch size: +8 \| lm loss: 7\.125000E\+00 \| loss scale: 1\.0 \| "
        r"grad norm: 1\.250 \| number of skipped iterations: +3 \| number of nan iterations: +1 \| "
        r"aux loss: 2\.0000 \| tokens per recursion 0: 1\.0000 \| tokens per recursion 1: 0\.5000 \| "
        rf"mean depth: 1\.5000 \| tokens per second: 1024 \| utilisation: ({number})% \|$"
    )
    assert re.match(pattern, line), line


def test_the_loss_scale_is_the_real_one():
    report = StepReport(7.0, 1.25, True, (), ROUTING, loss_scale=32768.0)
    progress = Progress(10, 80)
    got = training_record(CONFIG, progress, report, lr=3e-3, seconds=0.5, ranks=2, peak_tflops=2e-3)
    assert got["loss_scale"] == 32768.0
    assert "| loss scale: 32768.0 |" in log_line([record(9), got], last_iteration=100, now=datetime.now())


def test_log_line_averages_and_leaves_out_what_was_not_finite():
    records = [record(9, loss=4.0, seconds=0.25), record(10, loss=math.nan, norm=math.inf, seconds=0.75)]
    line = log_line(records, last_iteration=100, now=datetime.now())
    assert "lm loss: 4.000000E+00 |" in line
    assert "grad norm: nan |" in line
    assert "elapsed time per iteration (ms): 500.0 |" in line
    assert "tokens per second: 1024 |" in line


def test_record_counts_flops_of_the_tokens_that_were_routed():
    got = record(seconds=0.5)
    flops = 3 * executed_flops_per_token(CONFIG, [1.0, 0.5])
    assert got["tokens_per_second"] == 8 * 64 / 0.5
    assert got["tflops_per_gpu"] == pytest.approx(flops * 512 / 0.5 / 2 / 1e12)
    assert got["utilisation"] == pytest.approx(got["tflops_per_gpu"] / 2e-3)
    assert got["consumed_tokens"] == 80 * 64
    fewer = record(routing={**ROUTING, "tokens_per_recursion_1": 0.25})
    assert fewer["tflops_per_gpu"] < got["tflops_per_gpu"]
    taught = record(teacher=CONFIG)["tflops_per_gpu"]
    assert taught - got["tflops_per_gpu"] == pytest.approx(executed_flops_per_token(CONFIG) * 512 / 0.5 / 2 / 1e12)


def test_record_is_strict_json():
    text = json.dumps(record(loss=math.nan, norm=math.inf), allow_nan=False)
    assert json.loads(text)["lm_loss"] is None
    assert json.loads(json.dumps(record(loss=0.1 + 0.2)))["lm_loss"] == 0.1 + 0.2


def test_validation_line_gives_loss_and_perplexity():
    line = validation_line({"iteration": 5, "validation_loss_topk": math.log(8.0), "validation_loss_threshold": 1.0})
    assert "validation loss at iteration 5 |" in line
    assert "lm loss topk: 2.079442E+00 | lm loss PPL topk: 8.000000E+00 |" in line
    assert "lm loss PPL threshold: 2.718282E+00 |" in line
    assert "lm loss PPL topk: NAN |" in validation_line({"iteration": 5, "validation_loss_topk": None})
