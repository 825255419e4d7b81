"""The training loop: iterations, and what happens between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from mor_megatron.checkpointing.kept_tokenizer import KeptTokenizer
from mor_megatron.checkpointing.load import find_checkpoint, load_checkpoint
from mor_megatron.checkpointing.save import SaveError, Saver
from mor_megatron.config.schema import CheckpointConfig, Config
from mor_megatron.distributed.initialize import print_rank_0
from mor_megatron.distributed.roll_call import report_iteration
from mor_megatron.planning.teacher import beside
from mor_megatron.pretraining.batches import Batches
from mor_megatron.pretraining.heartbeat import Heartbeat, State
from mor_megatron.pretraining.observer import Observer
from mor_megatron.pretraining.peak import device_peak
from mor_megatron.pretraining.spikes import is_spike, update_average
from mor_megatron.pretraining.stopping import Stopper
from mor_megatron.pretraining.writers import Writer, open_writers
from mor_megatron.training.engine import Engine
from mor_megatron.training.evaluate import evaluate
from mor_megatron.training.lr_schedule import last_iteration, next_iteration
from mor_megatron.training.metrics import Record, log_line, training_record, validation_line
from mor_megatron.training.progress import Progress
from mor_megatron.training.train_step import StepReport, train_step


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(
    engine: Engine,
    config: Config,
    progress: Progress,
    batches: Batches,
    stopper: Stopper,
    tokenizer: KeptTokenizer | None = None,
    writers: Sequence[Writer] = (),
    teacher: Config | None = None,
) -> bool:
    """The iterations from `progress`, which is kept up to date, to the last; returns and raises as `pretrain`.

    Args:
        writers: more of them, which the caller closes; rank 0's are used.
        teacher: settings of the model of `distill_from`.
    """
    with contextlib.ExitStack() as stack:
        saver = None
        if config.checkpoint.save is not None:
            saver = stack.enter_context(Saver(engine, config, tokenizer))
        loop = _Loop(engine, config, progress, batches, stopper, saver, writers, teacher)
        stack.callback(loop.close)
        state: State = "failed"
        try:
            finished = loop.run()
            state = "finished" if finished else "stopped"
        except NonFiniteError:
            if saver is not None:
                saver.finish()  # all ranks are here, so that a checkpoint in flight need not be lost
            raise
        finally:
            loop.beat(state)
    return finished


class _Loop:
    """The state of a run between two iterations."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        progress: Progress,
        batches: Batches,
        stopper: Stopper,
        saver: Saver | None,
        writers: Sequence[Writer],
        teacher: Config | None,
    ):
        self.engine = engine
        self.config = config
        self.progress = progress
        self.batches = batches
        self.stopper = stopper
        self.saver = saver
        self.teacher = None if teacher is None else beside(config, teacher)
        self.peak, source = device_peak(config)
        print_rank_0(f"utilisation is measured against {self.peak:.3f} TFLOP/s a rank ({source})")
        self.files = open_writers(config, progress.iteration) if dist.get_rank() == 0 else []
        self.writers = [*self.files, *writers]
        reports = dist.get_rank() == 0 and config.checkpoint.save is not None
        self.heartbeat = Heartbeat(Path(config.checkpoint.save)) if reports else None
        self.first_iteration, self.last_iteration = progress.iteration, last_iteration(config, progress)
        self.observer = Observer(engine, config, progress.iteration)
        self.window: list[Record] = []
        """Records since the last log line."""

    def run(self) -> bool:
        """Iterate; whether the last iteration was reached."""
        training, checkpoint, progress = self.config.training, self.config.checkpoint, self.progress
        micro_batches = self.batches.training(progress)
        self.engine.module.train()
        if progress.iteration >= self.last_iteration:
            print_rank_0(f"already at {progress.iteration} of {self.last_iteration} iterations: nothing to do")
        while progress.iteration < self.last_iteration:
            config, lr = next_iteration(self.config, progress)
            report_iteration(progress.iteration + 1)
            self.observer.begin(progress.iteration + 1)
            start = time.perf_counter()
            report = train_step(
                self.engine, micro_batches, config, progress.iteration + 1, lr, sections=self.observer.sections
            )
            spiked = self._advance(report, config, lr, time.perf_counter() - start)
            if spiked and self._roll_back():
                micro_batches = self.batches.training(progress)
                continue
            last = progress.iteration == self.last_iteration
            reason = None if last else self.stopper.reason(progress.iteration)
            if reason is not None:
                self._save()  # before the evaluation: whoever sent the signal may not wait for long
            if self.batches.validation is not None and (last or progress.iteration % training.eval_interval == 0):
                self._evaluate()
            if reason is not None:
                return self._stop(reason)
            if self.saver is not None:
                self.saver.poll()
            interval = checkpoint.save_interval
            if last or (interval is not None and progress.iteration % interval == 0):
                self._save()
        self._finish_saving()
        self.observer.report(1)  # the last evaluation and checkpoint
        return True

    def beat(self, state: State) -> None:
        """Write the heartbeat file, if this rank does."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.progress.iteration, state)

    def close(self) -> None:
        """Close what records, and a profile, were written to."""
        self.observer.close()
        for writer in self.files:
            writer.close()

    def _advance(self, report: StepReport, config: Config, lr: float, seconds: float) -> bool:
        """Count an iteration of these settings and report it; whether its loss is a spike."""
        progress, factor = self.progress, config.faults.loss_spike_factor
        advance(progress, report, config)
        record = training_record(
            config,
            progress,
            report,
            lr=lr,
            seconds=seconds,
            ranks=dist.get_world_size(),
            peak_tflops=self.peak,
            teacher=self.teacher,
            observed=self.observer.end(progress.iteration),
        )
        self._write(record)
        self.window.append(record)
        last = self.last_iteration
        if progress.iteration == last or progress.iteration % self.config.logging.log_interval == 0:
            print_rank_0(log_line(self.window, last, datetime.now()))
            self.observer.report(len(self.window))
            self.window = []
        self.beat("training")
        if not report.applied:
            return False
        spiked = is_spike(report.lm_loss, progress, factor)
        if spiked:
            ratio = report.lm_loss / progress.loss_average
            print_rank_0(
                f" iteration {progress.iteration}: loss spike, {report.lm_loss:g} is {ratio:.2f} times the average "
                f"{progress.loss_average:g} (loss-spike-factor={factor:g})"
            )
        update_average(report.lm_loss, progress)
        return spiked

    def _roll_back(self) -> bool:
        """Go back to the last checkpoint, the samples since left out; False if that cannot be done.

        That is the last one this run has saved, or the one it began at: an earlier attempt may have left later ones.
        """
        progress, limit = self.progress, self.config.faults.max_rollbacks
        if progress.rollbacks >= limit:
            return False
        self.saver.finish()
        save, without_state = self.config.checkpoint.save, self.config.checkpoint.no_load_optim
        try:
            found = find_checkpoint(Path(save), newest=max(self.first_iteration, self.saver.last_saved))
        except ValueError as error:
            print_rank_0(f" no way back: {error}")
            return False
        if found is None:
            return False
        spiked, (directory, manifest) = copy(progress), found
        # What this run began with, it loads as it did then.
        without_state &= manifest.iteration <= self.first_iteration
        saved = CheckpointConfig(save=save, load=str(directory), no_load_optim=without_state)
        restored = load_checkpoint(self.engine, replace(self.config, checkpoint=saved))
        left_out = spiked.consumed_samples - restored.consumed_samples
        vars(progress).update(vars(restored))
        progress.consumed_samples = spiked.consumed_samples
        progress.left_out_samples += left_out
        progress.rollbacks = spiked.rollbacks + 1
        for writer in self.writers:
            writer.rewind(progress.iteration)
        self.window = []
        self.engine.module.train()
        print_rank_0(
            f" rollback {progress.rollbacks} of {limit}: from iteration {spiked.iteration} to {progress.iteration}; "
            f"samples {restored.consumed_samples} to {spiked.consumed_samples - 1} are left out"
        )
        return True

    def _evaluate(self) -> None:
        progress = self.progress
        validation = self.batches.validation
        with self.observer.sections("eval-time"):
            losses = evaluate(
                self.engine.module, validation.batches(), self.config, progress.iteration, validation.corpora
            )
        record = {"iteration": progress.iteration, "consumed_samples": progress.consumed_samples} | losses
        record |= self.observer.time_of_evaluation()
        self._write(record)
        print_rank_0(validation_line(record))

    def _save(self) -> None:
        if self.saver is not None:
            with self.observer.sections("save-checkpoint"):
                self.saver.save(self.progress)

    def _finish_saving(self) -> None:
        if self.saver is not None:
            self.saver.finish()
            if self.saver.last_failed is not None:
                raise SaveError(self.saver.last_failed)

    def _stop(self, reason: str) -> bool:
        self._finish_saving()
        saved = "saved" if self.saver is not None else "nothing is saved without --save"
        print_rank_0(f"stopping after iteration {self.progress.iteration} ({reason}): {saved}")
        return False

    def _write(self, record: Record) -> None:
        for writer in self.writers:
            writer.write(record)


def advance(progress: Progress, report: StepReport, config: Config) -> None:
    """Count an iteration, and announce a step that was not applied.

    An overflow that lowers the loss scale of fp16 is no fault: it only skips the step.

    Raises:
        NonFiniteError: more than `max_skipped_steps` consecutive steps were not finite.
    """
    progress.iteration += 1
    progress.consumed_samples += config.training.global_batch_size
    if report.applied:
        progress.skipped_in_a_row = 0
        return
    progress.skipped_iterations += 1
    if report.overflow:
        print_rank_0(f" iteration {progress.iteration}: overflow at loss scale {report.loss_scale:g}; step skipped")
        return
    progress.skipped_in_a_row += 1
    if report.lm_loss - report.lm_loss != 0.0:  # nan or inf
        progress.nan_iterations += 1
    where = f"on rank {', '.join(map(str, report.faulty_ranks))}" if report.faulty_ranks else "of the sum over ranks"
    what = f"iteration {progress.iteration}: loss {report.lm_loss:g}, loss or gradient not finite {where}"
    print_rank_0(f" {what}; step skipped, {progress.skipped_in_a_row} in a row")
    if progress.skipped_in_a_row > config.training.max_skipped_steps:
        raise NonFiniteError(
            f"{what}, {progress.skipped_in_a_row} steps in a row (max-skipped-steps="
            f"{config.training.max_skipped_steps}): lower --lr={config.optimizer.lr:g} or --clip-grad="
            f"{config.optimizer.clip_grad:g}, or look at the data of that rank"
        )
