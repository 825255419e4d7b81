"""The micro-batches of a rank: data and parallel layout brought together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron.core import parallel_state

from mor_megatron.config.schema import Config, DataConfig
from mor_megatron.data.batch import Batch
from mor_megatron.data.corpora import read_blends
from mor_megatron.data.datasets import build_batches, build_datasets, has_tokens, repetitions
from mor_megatron.data.tokenizers import Tokenizer
from mor_megatron.distributed.initialize import print_rank_0
from mor_megatron.training.lr_schedule import samples_left
from mor_megatron.training.progress import Progress


@dataclass(frozen=True)
class Evaluated:
    """A split to be evaluated."""

    batches: Callable[[], Iterator[Batch]]
    """This rank's micro-batches, from the first on: every evaluation sees the same ones."""
    corpora: tuple[str, ...]
    """Names of its corpora, in the order of `Batch.corpus_ids`."""


@dataclass(frozen=True)
class Batches:
    """This rank's micro-batches."""

    training: Callable[[Progress], Iterator[Batch]]
    """Those that the run has still to see; collective over all ranks."""
    validation: Evaluated | None
    """None: nothing is evaluated."""
    test: Evaluated | None
    """None but with `skip_train`, and where the test split has no data."""


def build_data(config: Config, tokenizer: Tokenizer | None) -> Batches:
    """Batches of this rank: of training and validation, or with `skip_train` of validation and test.

    Raises:
        ValueError: no or broken data.
    """
    training = config.training
    build = partial(build_datasets, config, tokenizer)
    evaluated = training.eval_iters * training.global_batch_size
    trained = 0 if training.skip_train else samples_left(config, Progress())
    tested = evaluated if training.skip_train and _has_test(config) else 0
    train_data, *others = build((trained, evaluated, tested))
    if train_data is not None and (repeated := repetitions(train_data)):
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
        return iter(deal(dataset, progress.consumed_samples))

    blends = read_blends(config.data)[1:]
    validation, test = (
        None if dataset is None else Evaluated(partial(iter, deal(dataset, 0)), tuple(blend.names()))
        for dataset, blend in zip(others, blends, strict=True)
    )
    return Batches(remaining, validation, test)


def _has_test(config: Config) -> bool:
    if has_tokens(config.data, "test"):
        return True
    print_rank_0("no test data (--split gives it no document, or --test-data-path is missing): validation only")
    return False


def _needs_eod(data: DataConfig) -> bool:
    return data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss
