"""Turn documents into indexed corpora with many processes.

The input is divided into parts, in order. Each worker takes the next part, tokenizes it and writes its token ids to its
own file (`encoding.py`). This process appends finished parts to the corpus in input order while the workers continue.
The corpus therefore does not depend on the number of workers, and the final names appear only when everything is
written.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mor_megatron.data.encoding import Done, Job, Settings, encode, start_worker
from mor_megatron.data.fingerprint import fingerprint
from mor_megatron.data.indexed import CorpusWriter, cannot_write, optimal_dtype, working_folder
from mor_megatron.data.inputs import STANDARD_INPUT
from mor_megatron.data.planning import cut, slice_target, survey
from mor_megatron.data.shards import ORIGIN, origin, shard_of, shard_prefix
from mor_megatron.data.sources import SHOWN, Broken, Slice, describe, require_usable, skipped
from mor_megatron.data.tokenizers import Tokenizer
from mor_megatron.files import write_whole


@dataclass
class Report:
    """The outcome of a run. `broken` describes the first of `broken_count` records; `empty` texts gave no token."""

    prefixes: list[str]
    documents: int = 0
    tokens: int = 0
    nbytes: int = 0
    empty: int = 0
    broken_count: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    keys: tuple[str, ...] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    strict: bool = False,
    paragraphs: bool = False,
    progress: bool = True,
    shard: tuple[int, int] | None = None,
) -> Report:
    """Write PREFIX_KEY_document.bin and .idx for each key, and the fingerprint of the tokenizer.

    Args:
        inputs: files, directories and patterns, as `inputs.py` takes them, in any format of `sources.py`.
        output_prefix: PREFIX; its directory is made if needed. Existing corpora are replaced at the very end.
        tokenizer: gives the ids; its vocabulary determines the dtype (`optimal_dtype`).
        keys: fields of a record that contain text.
        append_eod: end every document with the tokenizer's end-of-document token.
        workers: processes.
        strict: stop at the first broken record instead of skipping it.
        paragraphs: split plain text files at blank lines.
        progress: show a bar with MB/s and tokens/s on stderr.
        shard: (i, n) writes shard i of n, counted from 1, under its own name (`shard_prefix`). Merged in order, shards
            equal the corpus of one run. A shard may have no document.
    Raises:
        ValueError: a setting or an input is wrong, no document was found, writing failed, or a worker died. Nothing
            is left behind.
    """
    started = time.monotonic()
    if workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is needed.")
    if shard is not None and STANDARD_INPUT in inputs:
        raise ValueError(f"shard={shard[0]}/{shard[1]}: standard input cannot be divided: give files.")
    if append_eod:
        _ = tokenizer.eod  # raises here, not in a worker
    whole = survey(inputs, keys, paragraphs)
    require_usable(whole)
    slices = cut(whole if shard is None else shard_of(whole, *shard), workers)
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    dtype = optimal_dtype(tokenizer.vocab_size)
    counters = context.Value("q", 0), context.Value("q", 0), context.Event()
    settings = Settings(tokenizer, dtype, keys, append_eod, strict, *counters)
    made_with = fingerprint(tokenizer)
    report = Report([shard_prefix(f"{output_prefix}_{key}_document", shard) for key in keys])
    broken: list[Broken] = []
    with working_folder(output_prefix) as folder:
        jobs = [Job(i, part, folder) for i, part in enumerate(_parts(slices, workers))]
        writers = [CorpusWriter(folder, f"corpus{i}", dtype) for i in range(len(keys))]
        try:
            for prefix in report.prefixes if shard is not None else ():
                Path(f"{prefix}.idx").unlink(
                    missing_ok=True
                )  # if this run fails, an earlier corpus must not pass for its result
            with _Bar(jobs, settings, progress) as bar:
                for job, done in _run(jobs, settings, context, workers, bar):
                    for key, (writer, lengths) in enumerate(zip(writers, done.lengths, strict=True)):
                        writer.append(job.shard(key), lengths)
                        os.unlink(job.shard(key))
                    report.documents += len(done.lengths[0])
                    report.tokens += sum(int(lengths.sum(dtype="int64")) for lengths in done.lengths)
                    report.nbytes += done.nbytes
                    report.empty += done.empty
                    report.broken_count += done.broken_count
                    broken += done.broken[: SHOWN - len(broken)]
            report.broken = describe(broken)
            if report.tokens == 0 and shard is None:
                raise ValueError(
                    f"input={' '.join(inputs)} gave no document ({report.empty} empty, {report.broken_count} broken)."
                )
            for writer, prefix in zip(writers, report.prefixes, strict=True):
                if shard is not None:
                    write_whole(f"{prefix}{ORIGIN}", origin(whole, append_eod=append_eod))
                writer.publish(prefix, made_with)
        except OSError as error:
            raise cannot_write(output_prefix, error) from error
        except BrokenProcessPool as error:
            raise ValueError(
                f"workers={workers}: a worker process was killed, most often because memory ran out. Use fewer "
                "--workers. No output was left behind."
            ) from error
    report.seconds = time.monotonic() - started
    return report


def _parts(slices: list[Slice], workers: int) -> Iterator[tuple[Slice, ...]]:
    """Group consecutive slices until a group is worth its own file."""
    target = slice_target(sum(part.size for part in slices), workers)
    together: list[Slice] = []
    for part in slices:
        together.append(part)
        if sum(p.size for p in together) >= target:
            yield tuple(together)
            together = []
    if together:
        yield tuple(together)


def _run(jobs: list[Job], settings: Settings, context, workers: int, bar: _Bar) -> Iterator[tuple[Job, Done]]:
    """Yield results in the order of the jobs. Stop the workers if the caller fails or is interrupted."""
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(settings,))
    try:
        futures: list[Future[Done]] = [pool.submit(encode, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            while not wait([future], timeout=0.25).done:
                bar.refresh()
            done = future.result()
            bar.correct(done.nbytes - job.size)
            yield job, done
    finally:
        settings.stop.set()
        pool.shutdown(cancel_futures=True)


class _Bar:
    """Progress on stderr, from the workers' counters."""

    def __init__(self, jobs: list[Job], settings: Settings, show: bool):
        total = sum(job.size for job in jobs)
        self._settings = settings
        self._started = time.monotonic()
        often = 0.5 if sys.stderr.isatty() else 15.0  # a log file would keep every line
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=not show, desc="preprocess", mininterval=often)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_) -> None:
        self.refresh()
        self._bar.close()

    def refresh(self) -> None:
        speed = self._settings.tokens.value / (time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{speed / 1e3:,.0f} ktokens/s", refresh=False)
        self._bar.update(self._settings.nbytes.value - self._bar.n)

    def correct(self, difference: int) -> None:
        """Correct the total: sizes of compressed and columnar inputs are estimates until they are read."""
        self._bar.total += difference
        self.refresh()


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(report: Report) -> str:
    """The report as a few lines of text."""
    mib, seconds = report.nbytes / 1e6, max(report.seconds, 1e-9)
    lines = [
        f"{' '.join(Path(p).name for p in report.prefixes)}: {report.documents:,} documents, {report.tokens:,} tokens; "
        f"{mib:,.1f} MB in {seconds:,.1f} s ({mib / seconds:,.2f} MB/s, {report.tokens / seconds:,.0f} tokens/s)"
    ]
    lines += skipped(report.empty, report.broken_count, report.broken)
    return "\n".join(lines)
