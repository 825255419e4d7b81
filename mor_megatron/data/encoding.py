"""A preprocessing worker: it tokenizes parts of the input, each into its own file of ids.

A worker process is started once with `Settings` and then receives one `Job` after another from `preprocess.py`.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

from mor_megatron.data.sources import SHOWN, Broken, Document, Slice, describe, read
from mor_megatron.data.tokenizers import Tokenizer

# Size of a batch call of the tokenizer: large enough to amortize the call, small enough to stay in the caches.
_BATCH_DOCUMENTS, _BATCH_BYTES = 32, 1 << 18


@dataclass(frozen=True)
class Job:
    """Part `number` of the input, and the folder for its files."""

    number: int
    slices: tuple[Slice, ...]
    folder: str

    def shard(self, key: int) -> str:
        """The file for the ids of the key at this position."""
        return f"{self.folder}/part{self.number:06d}.{key}"

    @property
    def size(self) -> int:
        """Bytes of input, estimated for compressed and columnar files."""
        return sum(part.size for part in self.slices)


@dataclass
class Done:
    """The outcome of a job: for each key the number of tokens per document, and what was skipped."""

    lengths: list[np.ndarray]
    nbytes: int
    empty: int
    broken_count: int
    broken: list[Broken]


@dataclass(frozen=True)
class Settings:
    """Settings of a worker, passed once at its start."""

    tokenizer: Tokenizer
    dtype: type[np.integer]
    keys: tuple[str, ...]
    append_eod: bool
    strict: bool
    nbytes: object  # multiprocessing.Value: input bytes done
    tokens: object  # multiprocessing.Value: tokens written
    stop: object  # multiprocessing.Event: give up


_settings: Settings


def start_worker(settings: Settings) -> None:
    """Prepare this process, and let it end with its parent."""
    global _settings
    _settings = settings
    # The parent handles interrupts and tells the workers to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when its parent dies: a killed parent cannot stop its workers, which would wait forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode(job: Job) -> Done:
    """Tokenize a part of the input into one file of ids per key."""
    keys = range(len(_settings.keys))
    lengths: list[list[int]] = [[] for _ in keys]
    done = Done([], 0, 0, 0, [])
    with ExitStack() as stack:
        files = [stack.enter_context(open(job.shard(key), "wb", buffering=1 << 20)) for key in keys]
        for documents in _batches(itertools.chain.from_iterable(map(read, job.slices)), done):
            if _settings.stop.is_set():
                break  # nobody will read the result
            tokens = 0
            for key in keys:
                ids, sizes = _tokenize([document.texts[key] for document in documents], job)
                files[key].write(ids)
                lengths[key] += [size for size in sizes if size]
                done.empty += sizes.count(0)
                tokens += len(ids)
            nbytes = sum(document.nbytes for document in documents)
            done.nbytes += nbytes
            _add(_settings.nbytes, nbytes)
            _add(_settings.tokens, tokens)
    done.lengths = [np.array(sizes, dtype=np.int32) for sizes in lengths]
    return done


def _tokenize(texts: list[str], job: Job) -> tuple[np.ndarray, list[int]]:
    """Ids of all texts, [tokens], and the number of tokens per text; an empty text gets no end-of-document token."""
    tokenizer = _settings.tokenizer
    try:
        batch = tokenizer.tokenize_batch(texts)
    except ValueError as error:
        raise ValueError(f"{job.slices[0].path}: the tokenizer refuses a document ({error}).") from error
    if _settings.append_eod:
        for ids in batch:
            if ids:
                ids.append(tokenizer.eod)
    sizes = [len(ids) for ids in batch]
    flat = np.fromiter(itertools.chain.from_iterable(batch), np.int64, sum(sizes))
    if len(flat) and not 0 <= flat.min() <= flat.max() < tokenizer.vocab_size:
        raise ValueError(
            f"{job.slices[0].path}: token {flat.max()} is outside the vocabulary of {tokenizer.vocab_size}: use a "
            "larger --tokenizer-model number, or another tokenizer."
        )
    return flat.astype(_settings.dtype), sizes


def _batches(items: Iterable[Document | Broken], done: Done) -> Iterator[list[Document]]:
    batch: list[Document] = []
    nbytes = 0
    for item in items:
        if isinstance(item, Broken):
            if _settings.strict:
                raise ValueError(f"{describe([item])[0]} (--strict)")
            done.broken_count += 1
            if len(done.broken) < SHOWN:
                done.broken.append(item)
            continue
        batch.append(item)
        nbytes += item.nbytes
        if len(batch) == _BATCH_DOCUMENTS or nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _add(counter, amount: int) -> None:
    with counter.get_lock():
        counter.value += amount
