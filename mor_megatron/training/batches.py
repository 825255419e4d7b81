"""The micro-batches of a rank: data and parallel layout brought together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron.core import parallel_state

from mor_megatron.config.schema import Config, DataConfig
from mor_megatron.data.batch import Batch
from mor_megatron.data.datasets import build_batches, build_datasets, repetitions
from mor_megatron.data.tokenizers import Tokenizer
from mor_megatron.parallel.distributed import print_rank_0
from mor_megatron.training.progress import Progress
from mor_megatron.training.schedule import samples_left


@dataclass(frozen=True)
class Batches:
    """This rank's micro-batches."""

    training: Callable[[Progress], Iterator[Batch]]
    """Those that the run has still to see; collective over all ranks."""
    validation: Callable[[], Iterator[Batch]] | None
    """From the first on; None: nothing is evaluated."""


def build_data(config: Config, tokenizer: Tokenizer | None) -> Batches:
    """Training and validation batches of this rank.

    Raises:
        ValueError: no or broken data.
    """
    training = config.training
    build = partial(build_datasets, config, tokenizer)
    evaluated = training.eval_iters * training.global_batch_size
    train_data, validation_data, _ = build((samples_left(config, Progress()), evaluated, 0))
    if repeated := repetitions(train_data):
        print_rank_0(f"training reads {', '.join(repeated)}")

    deal = partial(
        build_batches,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        global_batch_size=training.global_batch_size,
        data=config.data,
        eod=tokenizer.eod if tokenizer is not None and _needs_eod(config.data) else None,
    )

    def remaining(progress: Progress) -> Iterator[Batch]:
        dataset = train_data
        end = progress.consumed_samples + samples_left(config, progress)
        if end > len(dataset):  # samples were left out, or the global batch was larger once
            dataset, _, _ = build((end, 0, 0))
        return deal(dataset, progress.consumed_samples)

    return Batches(remaining, partial(deal, validation_data, 0) if evaluated else None)


def _needs_eod(data: DataConfig) -> bool:
    return data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss
