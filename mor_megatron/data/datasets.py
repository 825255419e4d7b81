"""Training, validation and test samples of a run, and the order in which its ranks see them.

`build_datasets` gives three sequences of samples; `build_batches` divides one of them among the data-parallel ranks.
Sample i is a function of corpus, split and seed (see `gpt_dataset.py`), and iteration t reads samples
[t * global batch, (t + 1) * global batch) on any number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mor_megatron.config.run_schema import PATHS_PER_SPLIT
from mor_megatron.config.schema import Config, DataConfig
from mor_megatron.data.batch import Batch
from mor_megatron.data.corpora import SPLITS, Blend, read_blends
from mor_megatron.data.fingerprint import check_corpora
from mor_megatron.data.gpt_dataset import EpochDataset, EpochDatasetConfig
from mor_megatron.data.indexed import Index, read_index, read_tokens
from mor_megatron.data.tokenizers import Tokenizer
from mor_megatron.data.workers import WorkerContext, number_of_workers, serve

# Tokens at the start of a corpus that are compared with the vocabulary: enough to catch data of another tokenizer.
_PROBE = 1 << 20
_ABOUT_ONCE = 1.05
_NEEDS_EOD = (
    "reset-position-ids, reset-attention-mask and eod-mask-loss need an end-of-document token: give --tokenizer-type "
    "and --tokenizer-model."
)


def build_datasets(
    config: Config, tokenizer: Tokenizer | None, num_samples: tuple[int, int, int]
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Build training, validation and test datasets from the corpora that the settings name. Collective over all ranks.

    Rank 0 builds the sample indexes and caches them, and the others load them. This also works without a process group.

    Args:
        config: the data section and training.seed are read.
        tokenizer: compared with the tokenizer of the data; if None, tokens are compared with model.vocab_size, if set.
        num_samples: sequences that the run needs from each split; 0 returns None instead of a dataset.
    Returns:
        Megatron-core datasets; item i contains `tokens` and `labels`, [S] int64. Each has at least num_samples items; a
        smaller split is repeated, each time in another order.
    Raises:
        ValueError: there is no data, a blend or split is invalid, a corpus is damaged (names file and offset), tokens
            are outside the vocabulary or from another tokenizer, required ends of documents are missing, a split has
            no documents, or the cache directory cannot be written.
    """
    data = config.data
    blends = [blend if count else None for blend, count in zip(read_blends(data), num_samples, strict=True)]
    for name, blend, count in zip(SPLITS, blends, num_samples, strict=True):
        if count and blend is None:
            raise ValueError(_missing(data, name))
    vocab_size = tokenizer.vocab_size if tokenizer is not None else config.model.vocab_size
    indexes = {path: read_index(path) for blend in blends if blend is not None for path in blend.paths}
    for path, index in indexes.items():
        _check_vocabulary(path, index, vocab_size)
        if data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss:
            _check_ends(path, index, tokenizer)
        _check_writable(Path(data.data_cache_path or Path(path).parent / "index-cache"))
    for name, blend in zip(SPLITS, blends, strict=True):
        for path in () if blend is None else blend.paths:
            if _is_empty(blend, indexes[path]):
                raise ValueError(_no_tokens(data, name, path, len(indexes[path].lengths)))
    check_corpora(list(indexes), tokenizer)
    weighted = [None if blend is None else (list(blend.paths), _weights(blend, indexes)) for blend in blends]

    # Not at the top of the file: gpt_dataset.py must first silence the messages of Megatron-core's import.
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    # It warns that blends are not cached; they are cheap to build, and caching them needs a process group.
    logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)
    settings = EpochDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=data.seq_length,
        **_sources(data, weighted),
        tokenizer=_NoTokenizer(),
        # build_batches derives masks and positions from the tokens; an [S, S] mask is never made.
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        index_cache=data.data_cache_path,
    )
    if data.uses_split:
        settings.split_matrix = [
            part if wanted else None for part, wanted in zip(settings.split_matrix, num_samples, strict=True)
        ]
    builder = BlendedMegatronDatasetBuilder(EpochDataset, list(num_samples), lambda: True, settings)
    return tuple(builder.build())


def repetitions(dataset: Dataset) -> list[str]:
    """A notice for each corpus that a run reads more than about once.

    Args:
        dataset: from `build_datasets`.
    """
    parts = getattr(dataset, "datasets", [dataset])  # a blend requests a few more samples of each corpus than it reads
    passes = [(part.dataset_path, part.passes()) for part in parts]
    return [f"{path} {_three_digits(count)} times" for path, count in passes if count > _ABOUT_ONCE]


def _three_digits(count: float) -> str:
    return f"{count:.3g}" if count < 100 else f"{count:,.0f}"


def build_batches(
    dataset: Dataset,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    global_batch_size: int,
    data: DataConfig | None = None,
    eod: int | None = None,
) -> Iterable[Batch]:
    """This rank's micro-batches from `consumed_samples` on, until the dataset ends.

    Micro-batch m of an iteration covers micro_batch_size * data_parallel_size consecutive samples of the global batch,
    and rank r takes the r-th block of micro_batch_size of them (Megatron-LM's order). The ranks and micro-batches of
    one iteration together read exactly the global batch, however it is divided. Starting at any sample costs the same,
    and torch's global random state does not change.

    Args:
        dataset: from `build_datasets`.
        consumed_samples: samples that all ranks together have seen.
        micro_batch_size: B, samples per micro-batch.
        data_parallel_rank: r.
        data_parallel_size: ranks that share a global batch.
        global_batch_size: samples per iteration.
        data: reset_position_ids, reset_attention_mask, eod_mask_loss and num_workers are read; default: all off.
        eod: end-of-document id; required if one of the first three is set.
    Returns:
        `Batch`es, tensors [B, S] on the CPU, in pinned memory if there is CUDA. Worker processes start with the first
        iteration, and stay for later ones.
    Raises:
        ValueError: the sizes do not divide, or a required eod is missing.
    """
    data = data or DataConfig()
    stride = micro_batch_size * data_parallel_size
    if global_batch_size % stride:
        raise ValueError(
            f"global-batch-size={global_batch_size} is not a multiple of micro-batch-size x data-parallel size = "
            f"{micro_batch_size} x {data_parallel_size}: use {max(1, round(global_batch_size / stride)) * stride}."
        )
    if eod is None and (data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss):
        raise ValueError(_NEEDS_EOD)
    workers = number_of_workers(data)
    return DataLoader(
        dataset,
        batch_sampler=_MicroBatches(len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, stride),
        collate_fn=partial(make_batch, data=data, eod=eod),
        num_workers=workers,
        multiprocessing_context=WorkerContext() if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(serve, os.getpid()),
        pin_memory=torch.cuda.is_available(),
        # The loader draws a seed for its workers; drawn from the global generator, it would change the model's dropout.
        generator=torch.Generator(),
    )


class _MicroBatches:
    """Sample ids of one rank's micro-batches, in order."""

    def __init__(self, total: int, consumed: int, size: int, rank: int, stride: int):
        assert 0 <= rank * size < stride
        self._first, self._last, self._stride = consumed, total - stride, stride
        self._begin, self._size = rank * size, size

    def __iter__(self) -> Iterator[range]:
        for first in range(self._first, self._last + 1, self._stride):
            yield range(first + self._begin, first + self._begin + self._size)


def make_batch(samples: Sequence[dict], data: DataConfig, eod: int | None) -> Batch:
    """Stack samples, and derive masks, positions and documents from their end-of-document tokens.

    Args:
        samples: B items with `tokens` and `labels`, [S] int64.
        data: reset_position_ids, reset_attention_mask and eod_mask_loss are read.
        eod: end-of-document id; may be None if none of these is set.
    """
    tokens = torch.stack([sample["tokens"] for sample in samples])
    labels = torch.stack([sample["labels"] for sample in samples])
    ends = tokens == eod if eod is not None else torch.zeros_like(tokens, dtype=torch.bool)
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=1.0 - ends.float() if data.eod_mask_loss else None,
        position_ids=_positions(ends) if data.reset_position_ids else None,
        document_ids=_documents(ends) if data.reset_attention_mask else None,
        corpus_ids=torch.tensor([int(s["dataset_id"]) for s in samples]) if "dataset_id" in samples[0] else None,
    )


def _documents(ends: torch.Tensor) -> torch.Tensor:
    """Index of each token's document, [B, S] int64; an end-of-document token belongs to the document it ends."""
    return ends.cumsum(1) - ends.long()


def _positions(ends: torch.Tensor) -> torch.Tensor:
    """Distance of each token from the first token of its document, [B, S] int64."""
    index = torch.arange(ends.shape[1]).expand(ends.shape)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(ends[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(1).values


def has_tokens(data: DataConfig, split: str) -> bool:
    """Whether a split, one of `SPLITS`, has documents of each of its corpora.

    Raises:
        ValueError: a corpus is missing or damaged, or the settings name none.
    """
    blend = read_blends(data)[SPLITS.index(split)]
    return blend is not None and not any(_is_empty(blend, read_index(path)) for path in blend.paths)


def _sources(data: DataConfig, weighted: list[tuple[list[str], list[float] | None] | None]) -> dict:
    """The blends in Megatron-core's form."""
    if not data.uses_split:
        return {"blend_per_split": weighted}
    # All splits are parts of one blend.
    blend = next(blend for blend in weighted if blend is not None)
    return {"blend": blend, "split": ",".join(map(str, data.proportions()))}


def _weights(blend: Blend, indexes: dict[str, Index]) -> list[float] | None:
    if len(blend.paths) == 1:
        return None
    return list(blend.weights or (float(indexes[path].tokens) for path in blend.paths))


def _is_empty(blend: Blend, index: Index) -> bool:
    """Refuse empty splits: Megatron-core repeats a split until it has enough tokens, and would never finish."""
    count = len(index.lengths)
    return not index.lengths[round(blend.begin * count) : round(blend.end * count)].sum(dtype=np.int64)


def _no_tokens(data: DataConfig, name: str, path: str, count: int) -> str:
    """The message for a corpus of `count` documents that gives a split nothing."""
    otherwise = ", or more data" if name == "training" else ", more data, or --eval-iters 0"
    if not data.uses_split:
        return f"{path}, named for {name}, contains no token: leave it out."
    share = math.ceil(100 / count)  # per cent, at least one document
    shares = {"training": (90, 10, 0), "validation": (100 - share, share, 0), "test": (100 - 2 * share, share, share)}
    remedy = f"use --split {','.join(map(str, shares[name]))}"
    if shares[name][0] <= 0:  # too few documents to divide
        remedy = "give it a corpus of its own (--train-data-path, --valid-data-path, --test-data-path)"
    documents = f"{count} {'document' if count == 1 else 'documents'}"
    return f"split={data.split} leaves no tokens for {name} in {path}, which has {documents}: {remedy}{otherwise}."


def _missing(data: DataConfig, name: str) -> str:
    flag = PATHS_PER_SPLIT[SPLITS.index(name)].replace("_", "-")
    if data.per_split_data_args_path is not None:
        flag = f"{flag.split('-')[0]} in per-split-data-args-path={data.per_split_data_args_path}"
    without = "" if name == "training" else ", or --eval-iters 0"
    return f"{flag} is missing, and {name} has no other data: give it{without}."


def _check_vocabulary(path: str, index: Index, vocab_size: int | None) -> None:
    head = read_tokens(path, index)[:_PROBE]
    bad = np.flatnonzero((head < 0) | (head >= vocab_size)) if vocab_size is not None else []
    if len(bad):
        raise ValueError(
            f"{path}.bin has token {head[bad[0]]} at byte {int(bad[0]) * head.itemsize}, outside the vocabulary of "
            f"{vocab_size}: it was made with another tokenizer. Preprocess it again, or change --tokenizer-model."
        )


def _check_ends(path: str, index: Index, tokenizer: Tokenizer | None) -> None:
    """Refuse data without ends of documents if a setting needs them; the setting would have no effect."""
    if tokenizer is None:
        raise ValueError(_NEEDS_EOD)
    last = int(index.lengths[: index.bounds[1]].sum(dtype=np.int64)) - 1
    token = int(read_tokens(path, index)[last])
    if token != tokenizer.eod:
        raise ValueError(
            f"{path}: the first document ends with token {token}, not with the end-of-document token {tokenizer.eod}. "
            "reset-position-ids, reset-attention-mask and eod-mask-loss need data made with --append-eod."
        )


def _check_writable(folder: Path) -> None:
    """Check on every rank: if only rank 0 failed, the others would wait for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"data-cache-path: {folder} cannot be written. Set --data-cache-path to a writable directory.")


class _NoTokenizer:
    """A placeholder tokenizer: Megatron-core would use its ids for masks, which are made here instead."""

    vocab_size = None
    eod = -2  # matches no token; -1 would be padding for Megatron-core
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012
