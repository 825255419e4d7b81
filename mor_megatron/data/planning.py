"""Divide the input into slices that can be read independently, in input order.

The input is first divided among shards, by the input alone, so that each machine finds its own shard. It is then
divided among the workers of one machine, as needed. The corpus depends on neither.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mor_megatron.data.inputs import expand
from mor_megatron.data.sources import (
    DATASET,
    JSONL,
    PARQUET,
    SUPPORTED,
    TEXT,
    Slice,
    compression,
    decompressed_length,
    first_bytes,
    kind_of,
    open_dataset,
    open_parquet,
)

# Slices are small enough to balance workers and to show progress, and large enough that opening one costs little.
_SMALLEST_SLICE, _LARGEST_SLICE = 1 << 18, 256 << 20
_SLICES_PER_WORKER = 16
# Bytes of text per compressed byte; only an estimate, for progress and slice sizes.
_TYPICAL_COMPRESSION = 3
# The start of a file with JSON values over several lines, or with all of them in one array.
_OPENS_VALUE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:(?P<array>\[\s*\{|\[[ \t\r]*\n)|\{[ \t\r]*\n)")


def plan(
    inputs: list[str], keys: tuple[str, ...] = ("text",), workers: int = 1, paragraphs: bool = False
) -> list[Slice]:
    """The slices of the whole input: `survey`, then `cut`."""
    return cut(survey(inputs, keys, paragraphs), workers)


def survey(inputs: list[str], keys: tuple[str, ...] = ("text",), paragraphs: bool = False) -> list[Slice]:
    """One slice for each file or dataset of the input.

    Args:
        inputs: what `inputs.expand` takes.
        keys: the fields of a record that contain text, `a.b` for a field b in a; plain text has only the key `text`.
        paragraphs: split plain text at blank lines into documents, instead of one document per file.
    Raises:
        ValueError: an input is missing or unreadable, a format is unknown, or a column is missing.
    """
    return [_whole(path, keys, paragraphs) for path in expand(inputs)]


def cut(parts: Sequence[Slice], workers: int) -> list[Slice]:
    """Slices for a number of workers, in input order."""
    target = slice_target(sum(part.size for part in parts), workers)
    compressed = sum(part.kind == JSONL and part.stop is None for part in parts)
    slices: list[Slice] = []
    for part in parts:
        if part.kind == JSONL and part.stop is None and compressed < workers and part.size > _SMALLEST_SLICE:
            # Too few files for the workers. Each range decompresses everything before it, so make no more than needed.
            slices += _cut(replace(part, stop=decompressed_length(part.path)), workers)
        elif part.stop is None:
            slices.append(part)
        elif part.kind == PARQUET:
            slices += _cut(part, part.stop - part.start)
        else:
            slices += _cut(part, min(part.stop - part.start, -(-part.size // target)))
    return slices


def slice_target(total: int, workers: int) -> int:
    """Size in bytes of a unit of work when `workers` share `total`."""
    return min(max(total // (_SLICES_PER_WORKER * workers), _SMALLEST_SLICE), _LARGEST_SLICE)


def _cut(part: Slice, pieces: int) -> list[Slice]:
    """Divide `part` into `pieces` ranges of about the same length."""
    length = part.stop - part.start
    edges = [part.start + length * i // pieces for i in range(pieces + 1)] if pieces else []
    return [replace(part, start=a, stop=b, size=part.size * (b - a) // length) for a, b in itertools.pairwise(edges)]


def _whole(path: str, keys: tuple[str, ...], paragraphs: bool) -> Slice:
    place = Path(path)
    if not place.exists():
        raise ValueError(f"input={path} does not exist.")
    if place.is_dir():
        dataset = open_dataset(path, keys)
        _need_columns(path, keys, dataset.column_names)
        nbytes = dataset.select_columns(list(keys)).data.nbytes
        return Slice(path, DATASET, keys, size=nbytes, stop=len(dataset))
    try:
        with place.open("rb"):
            size = place.stat().st_size
    except OSError as error:
        raise ValueError(f"input={path} cannot be read ({error.strerror}).") from error
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"input={path}: unknown format {place.suffix or 'without extension'}. Supported: {SUPPORTED}.")
    if kind == PARQUET:
        file, columns = open_parquet(path, keys)
        _need_columns(path, keys, columns)
        return Slice(path, PARQUET, keys, size=size * _TYPICAL_COMPRESSION, stop=file.metadata.num_row_groups)
    compressed = compression(path) is not None
    size *= _TYPICAL_COMPRESSION if compressed else 1
    if kind == TEXT:
        _need_columns(path, keys, ["text"])
        return Slice(path, TEXT, keys, size=size, paragraphs=paragraphs)
    _need_lines(path)
    return Slice(path, JSONL, keys, size=size, stop=None if compressed else size)


def _need_lines(path: str) -> None:
    """Refuse a file that is one JSON value: only its last record may look like a line, and the rest would be lost."""
    opening = _OPENS_VALUE.match(first_bytes(path))
    if opening is not None:
        what, filter = ("a JSON array", ".[]") if opening["array"] else ("JSON over several lines", ".")
        raise ValueError(
            f"input={path} is {what}, not JSON lines, which have one object on each: convert it, for example with "
            f"`jq -c {filter} {path}`."
        )


def _need_columns(path: str, keys: tuple[str, ...], there: list[str]) -> None:
    for key in keys:
        if key not in there:
            raise ValueError(f"json-keys={key} is not in {path}: it has {', '.join(there)}.")
