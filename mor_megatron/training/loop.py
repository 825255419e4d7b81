"""A whole pretraining run, from a configuration to the last checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

import torch.distributed as dist
from megatron.core import parallel_state

from mor_megatron.checkpointing.load import load_checkpoint
from mor_megatron.checkpointing.save import SaveError, Saver
from mor_megatron.config.schema import Config, DataConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.data.datasets import build_batches, build_datasets
from mor_megatron.data.tokenizers import Tokenizer, configured_tokenizer, resolve_vocab_size
from mor_megatron.model import build_model
from mor_megatron.parallel.distributed import initialize_distributed
from mor_megatron.parallel.launch import launched_world_size
from mor_megatron.parallel.layout import describe_layout
from mor_megatron.recursion.accounting import count_parameters, executed_flops_per_token
from mor_megatron.training.capabilities import capability_line
from mor_megatron.training.engine import Engine, build_engine
from mor_megatron.training.evaluate import evaluate
from mor_megatron.training.metrics import (
    Record,
    Writer,
    log_line,
    open_writers,
    training_record,
    validation_line,
)
from mor_megatron.training.peak import device_peak
from mor_megatron.training.progress import Progress
from mor_megatron.training.schedule import learning_rate
from mor_megatron.training.train_step import StepReport, train_step


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Batches:
    """This rank's micro-batches."""

    training: Callable[[int], Iterator[Batch]]
    """From a number of consumed samples on."""
    validation: Callable[[], Iterator[Batch]] | None
    """From the first on; None: nothing is evaluated."""


def pretrain(config: Config) -> None:
    """Train to `train_iters`: resume, iterate, evaluate, save, report. Every rank calls it.

    Raises:
        ValueError: the settings, data or checkpoint do not fit; the message names field, value and remedy.
        NonFiniteError: more than `max_skipped_steps` steps in a row were not finite.
        SaveError: the last checkpoint, or with `on_save_failure` stop any, could not be written.
    """
    config = validate(config, dist.get_world_size() if dist.is_initialized() else launched_world_size() or 1)
    initialize_distributed(config)
    tokenizer = configured_tokenizer(config.data)
    vocab_size = resolve_vocab_size(config, tokenizer)
    batches = build_data(config, tokenizer)
    model = build_model(config, vocab_size)
    engine = build_engine(model, config)
    _say(capability_line(config))
    progress = load_checkpoint(engine, config, vocab_size)
    _say(_description(config, vocab_size))
    _say(describe_layout(config, vocab_size, dist.get_world_size()))
    train(engine, config, progress, batches, vocab_size)


def train(engine: Engine, config: Config, progress: Progress, batches: Batches, vocab_size: int) -> None:
    """The iterations from `progress` to `train_iters`; raises as `pretrain` does."""
    peak, peak_source = device_peak(config)
    _say(f"utilisation is measured against {peak:.3f} TFLOP/s a rank ({peak_source})")
    with contextlib.ExitStack() as stack:
        writers = open_writers(config, progress.iteration) if dist.get_rank() == 0 else []
        for writer in writers:
            stack.callback(writer.close)
        saver = stack.enter_context(Saver(engine, config, vocab_size)) if config.checkpoint.save is not None else None
        try:
            _iterate(engine, config, progress, batches, vocab_size, peak, writers, saver)
        except NonFiniteError:
            if saver is not None:
                saver.finish()  # all ranks are here, so that a checkpoint in flight need not be lost
            raise


def _iterate(
    engine: Engine,
    config: Config,
    progress: Progress,
    batches: Batches,
    vocab_size: int,
    peak: float,
    writers: list[Writer],
    saver: Saver | None,
) -> None:
    training = config.training
    train_batches = batches.training(progress.consumed_samples)
    window: list[Record] = []
    engine.module.train()
    while progress.iteration < training.train_iters:
        lr = learning_rate(config.optimizer, progress.iteration)
        start = time.perf_counter()
        report = train_step(engine, train_batches, config, progress.iteration + 1, lr)
        seconds = time.perf_counter() - start
        advance(progress, report, config)
        window.append(
            training_record(
                config,
                vocab_size,
                progress,
                report,
                lr=lr,
                seconds=seconds,
                ranks=dist.get_world_size(),
                peak_tflops=peak,
            )
        )
        _write(writers, window[-1])
        last = progress.iteration == training.train_iters
        if last or progress.iteration % config.logging.log_interval == 0:
            _say(log_line(window, training.train_iters, datetime.now()))
            window = []
        if batches.validation is not None and (last or progress.iteration % training.eval_interval == 0):
            losses = evaluate(engine.module, batches.validation(), config, progress.iteration)
            record = {"iteration": progress.iteration, "consumed_samples": progress.consumed_samples} | losses
            _write(writers, record)
            _say(validation_line(record))
        if saver is not None:
            saver.poll()
            interval = config.checkpoint.save_interval
            if last or (interval is not None and progress.iteration % interval == 0):
                saver.save(progress)
    if saver is not None:
        saver.finish()
        if saver.last_failed is not None:
            raise SaveError(saver.last_failed)


def advance(progress: Progress, report: StepReport, config: Config) -> None:
    """Count an iteration, and announce a step that was not applied.

    An overflow that lowers the loss scale of fp16 is no fault: it only skips the step.

    Raises:
        NonFiniteError: it was one too many.
    """
    progress.iteration += 1
    progress.consumed_samples += config.training.global_batch_size
    if report.applied:
        progress.skipped_in_a_row = 0
        return
    progress.skipped_iterations += 1
    if report.overflow:
        _say(f" iteration {progress.iteration}: overflow at loss scale {report.loss_scale:g}; step skipped")
        return
    progress.skipped_in_a_row += 1
    if report.lm_loss - report.lm_loss != 0.0:  # nan or inf
        progress.nan_iterations += 1
    where = f"on rank {', '.join(map(str, report.faulty_ranks))}" if report.faulty_ranks else "of the sum over ranks"
    what = f"iteration {progress.iteration}: loss {report.lm_loss:g}, loss or gradient not finite {where}"
    _say(f" {what}; step skipped, {progress.skipped_in_a_row} in a row")
    if progress.skipped_in_a_row > config.training.max_skipped_steps:
        raise NonFiniteError(
            f"{what}, {progress.skipped_in_a_row} steps in a row (max-skipped-steps="
            f"{config.training.max_skipped_steps}): lower --lr={config.optimizer.lr:g} or --clip-grad="
            f"{config.optimizer.clip_grad:g}, or look at the data of that rank"
        )


def build_data(config: Config, tokenizer: Tokenizer | None) -> Batches:
    """Training and validation batches of this rank.

    Raises:
        ValueError: no or broken data.
    """
    training = config.training
    evaluates = training.eval_iters > 0
    samples = (training.train_iters * training.global_batch_size, training.eval_iters * training.global_batch_size, 0)
    train_data, validation_data, _ = build_datasets(config, tokenizer, samples)

    deal = partial(
        build_batches,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        global_batch_size=training.global_batch_size,
        data=config.data,
        eod=tokenizer.eod if tokenizer is not None and _needs_eod(config.data) else None,
    )
    return Batches(partial(deal, train_data), partial(deal, validation_data, 0) if evaluates else None)


def _needs_eod(data: DataConfig) -> bool:
    return data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss


def _description(config: Config, vocab_size: int) -> str:
    counted = replace(config, model=replace(config.model, vocab_size=vocab_size))
    parameters = count_parameters(counted)
    return (
        f"{config.model.num_layers} layers unrolled, routing {config.recursion.routing}, "
        f"{config.recursion.num_recursions} recursions, vocabulary {vocab_size}: {parameters.unique:,} parameters "
        f"({parameters.non_embedding:,} without embedding), "
        f"{executed_flops_per_token(counted) / 1e6:.1f} MFLOP a token forward"
    )


def _write(writers: list[Writer], record: Record) -> None:
    for writer in writers:
        writer.write(record)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)
