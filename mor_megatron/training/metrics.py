"""What is reported about a run, and under which names.

Every iteration makes one record; metrics.jsonl, TensorBoard and W&B get each, the log line the means since the last
line. Router metrics keep the names they have in `recursion.context`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import measured_fractions, training_flops_per_token
from mor_megatron.training.progress import Progress

if TYPE_CHECKING:  # names and lines are wanted where no engine is
    from mor_megatron.training.train_step import StepReport

Record = dict[str, float | int | None]

TOPK_LOSS, THRESHOLD_LOSS = "validation_loss_topk", "validation_loss_threshold"
"""Validation loss by how tokens are selected: the whole sequence's best, which is not causal; one by one, which is."""
FIXED_DEPTH_LOSS = "validation_loss_depth_{}"
"""Validation loss with every token at one depth, counted from 1 (`--eval-fixed-depths`); causal."""
DIVERGENCE = "distillation_kl"
"""KL(teacher || model) of training tokens at --distill-temperature, nats; `lm_loss` beside it is the cross entropy."""
CORPUS_LOSS = "{}/{}"
"""Loss on one of several corpora: `TOPK_LOSS` or `THRESHOLD_LOSS`, and the corpus's name."""


def training_record(
    config: Config,
    progress: Progress,
    report: StepReport,
    *,
    lr: float,
    seconds: float,
    ranks: int,
    peak_tflops: float,
    teacher: Config | None = None,
    observed: dict[str, float] | None = None,
) -> Record:
    """The record of one iteration.

    Args:
        progress: after the iteration.
        report: what it did.
        lr: learning rate of its step.
        seconds: its wall-clock time.
        ranks: processes that shared the work.
        peak_tflops: of one of them.
        teacher: its settings beside the run, from `planning.teacher.beside`.
        observed: what an `Observer` adds.
    Returns:
        Name -> value; None where it is not finite, which JSON cannot express. `tflops_per_gpu` and `utilisation`
        count model FLOPs (MFU), `hardware_utilisation` those that recomputation repeats, too (HFU). Both count what a
        teacher computes.
    """
    tokens = config.training.global_batch_size * config.data.seq_length
    fractions = measured_fractions(report.routing, config.recursion.num_recursions)
    flops = training_flops_per_token(config, fractions, teacher)
    tera_a_second = tokens / seconds / ranks / 1e12
    record = {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_samples * config.data.seq_length,
        "lm_loss": report.lm_loss,
        "grad_norm": report.grad_norm,
        "learning_rate": lr,
        "loss_scale": report.loss_scale,
        "global_batch_size": config.training.global_batch_size,
        "skipped_iterations": progress.skipped_iterations,
        "nan_iterations": progress.nan_iterations,
        **(observed or {}),
        "iteration_time_ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "tflops_per_gpu": flops.model * tera_a_second,
        "utilisation": flops.model * tera_a_second / peak_tflops,
        "hardware_utilisation": flops.hardware * tera_a_second / peak_tflops,
        **({} if report.divergence is None else {DIVERGENCE: report.divergence}),
        **report.routing,
    }
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def log_line(records: list[Record], last_iteration: int, now: datetime) -> str:
    """Megatron-LM's log line, its fields in its order, then the router's and ours.

    Times, losses and router metrics are means over `records`, the iterations since the last line; the rest is the last
    one's.
    """
    last = records[-1]
    seconds = _mean(records, "iteration_time_ms") / 1e3
    tokens = [record["tokens_per_second"] * record["iteration_time_ms"] / 1e3 for record in records]  # batches may grow
    tokens_per_second = sum(tokens) / len(tokens) / seconds
    fields = [
        f"iteration {last['iteration']:8d}/{last_iteration:8d}",
        f"consumed samples: {last['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1e3 * seconds:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {_mean(records, 'tflops_per_gpu'):.3f}",
        f"learning rate: {last['learning_rate']:.6E}",
        f"global batch size: {last['global_batch_size']:5d}",
        f"lm loss: {_mean(records, 'lm_loss'):.6E}",
        f"loss scale: {last['loss_scale']:.1f}",
        f"grad norm: {_mean(records[-1:], 'grad_norm'):.3f}",
        *([f"params norm: {last['params_norm']:.3f}"] if "params_norm" in last else []),
        f"number of skipped iterations: {last['skipped_iterations']:3d}",
        f"number of nan iterations: {last['nan_iterations']:3d}",
    ]
    for name in list(last)[list(last).index("hardware_utilisation") + 1 :]:
        fields.append(f"{name.replace('_', ' ')}: {_mean(records, name):.4f}")
    fields.append(f"tokens per second: {tokens_per_second:.0f}")
    fields.append(f"utilisation: {100 * _mean(records, 'utilisation'):.1f}%")
    if last["hardware_utilisation"] != last["utilisation"]:
        fields.append(f"hardware utilisation: {100 * _mean(records, 'hardware_utilisation'):.1f}%")
    return f" [{now:%Y-%m-%d %H:%M:%S}] " + " | ".join(fields) + " |"


def validation_line(record: Record, split: str | None = None) -> str:
    """Losses of one evaluation and their perplexities, in the manner of Megatron-LM.

    Args:
        split: printed if given; None where only validation is evaluated.
    """
    losses = {name: value for name, value in record.items() if name.startswith("validation_loss")}
    where = "" if split is None else f" on {split} set"
    fields = [f" validation loss at iteration {record['iteration']}{where}"]
    for name, loss in losses.items():
        loss = math.nan if loss is None else loss
        label = name.removeprefix("validation_loss_")
        fields += [f"lm loss {label}: {loss:.6E}", f"lm loss PPL {label}: {math.exp(min(loss, 20.0)):.6E}"]
    return " | ".join(fields) + " |"


def _mean(records: Iterable[Record], name: str) -> float:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else math.nan
