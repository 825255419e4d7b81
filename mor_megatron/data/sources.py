"""Read documents from JSONL (.gz and .zst too), parquet, plain text and Hugging Face dataset directories.

`plan` cuts the input into slices that can be read independently, in input order; `read` yields the documents of one
slice. Which worker reads a slice never changes what is in it, so a corpus does not depend on the number of workers.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

JSONL, TEXT, PARQUET, DATASET = "jsonl", "text", "parquet", "dataset"
_KINDS = {".jsonl": JSONL, ".json": JSONL, ".ndjson": JSONL, ".txt": TEXT, ".text": TEXT, ".md": TEXT}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUPPORTED = (
    "JSON lines (.jsonl .json .ndjson), plain text (.txt .text .md), either compressed (.gz .zst), .parquet, or a "
    "directory written by datasets' save_to_disk"
)

# Slices are small enough to balance workers and to show progress, large enough that opening one costs nothing.
_SMALLEST_SLICE, _LARGEST_SLICE = 1 << 18, 256 << 20
_SLICES_PER_WORKER = 16
# Only an estimate for progress and slice sizes: how much text a compressed byte holds.
_TYPICAL_COMPRESSION = 3


@dataclass(frozen=True)
class Slice:
    """A part of one input: bytes of the decompressed file (jsonl), row groups (parquet) or rows (dataset).

    `stop` None means to the end. `size` is bytes of input, exact for jsonl without compression, else an estimate.
    """

    path: str
    kind: str
    keys: tuple[str, ...]
    size: int
    start: int = 0
    stop: int | None = None
    paragraphs: bool = False


@dataclass(frozen=True)
class Document:
    """One document: a text for each key, and the bytes of input it took."""

    texts: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used. `position` is the byte offset of a line, or the row number, from 0."""

    path: str
    unit: str  # "line", "row" or "file"
    position: int
    reason: str


def plan(
    inputs: list[str], keys: tuple[str, ...] = ("text",), workers: int = 1, paragraphs: bool = False
) -> list[Slice]:
    """Cut the inputs into slices, in input order.

    Args:
        inputs: files and dataset directories.
        keys: the fields of a record that hold text; plain text files have the one key `text`.
        workers: how many processes will share the slices.
        paragraphs: cut plain text at blank lines into documents, instead of one document per file.
    Raises:
        ValueError: a missing or unreadable input, an unknown format, or a column that is not there.
    """
    whole = [_whole(path, keys, paragraphs) for path in inputs]
    target = slice_target(sum(part.size for part in whole), workers)
    compressed = sum(part.kind == JSONL and _compression(part.path) is not None for part in whole)
    slices: list[Slice] = []
    for part in whole:
        if part.kind == JSONL and _compression(part.path) is None:
            slices += _cut(part, part.size, -(-part.size // target), part.size)
        elif part.kind == JSONL and compressed < workers and part.size > _SMALLEST_SLICE:
            # Too few files to go round. Each range decompresses what lies before it, so cut no finer than needed.
            length = _decompressed_length(part.path)
            slices += _cut(part, length, workers, length)
        elif part.kind == PARQUET:
            groups = _parquet(part.path).metadata.num_row_groups
            slices += _cut(part, groups, groups, part.size)
        elif part.kind == DATASET:
            rows = len(_dataset(part.path))
            slices += _cut(part, rows, min(rows, -(-part.size // target)), part.size)
        else:
            slices.append(part)
    return slices


def read(part: Slice) -> Iterator[Document | Broken]:
    """The documents of a slice, in order, with a `Broken` in the place of each record that has none.

    Raises:
        ValueError: the file itself is damaged, such as compressed data that ends early.
    """
    readers = {JSONL: _read_jsonl, TEXT: _read_text, PARQUET: _read_parquet, DATASET: _read_dataset}
    try:
        yield from readers[part.kind](part)
    except OSError as error:  # the decompressors report damage as OSError, too
        raise ValueError(f"{part.path} cannot be read ({error}): replace the file, or leave it out.") from error


def describe(broken: list[Broken]) -> list[str]:
    """`file:line: reason` for each record. Counts lines up to the byte offsets, so it reads those files once more."""
    lines: dict[tuple[str, int], int] = {}
    for path in {b.path for b in broken if b.unit == "line"}:
        offsets = sorted({b.position for b in broken if b.path == path})
        lines |= {(path, offset): n for offset, n in zip(offsets, _line_numbers(path, offsets), strict=True)}
    places = {
        "line": lambda b: f"{b.path}:{lines[b.path, b.position]}",
        "row": lambda b: f"{b.path}, row {b.position}",
        "file": lambda b: b.path,
    }
    return [f"{places[b.unit](b)}: {b.reason}" for b in broken]


def slice_target(total: int, workers: int) -> int:
    """Bytes that a unit of work should have when `workers` share `total`."""
    return min(max(total // (_SLICES_PER_WORKER * workers), _SMALLEST_SLICE), _LARGEST_SLICE)


def _whole(path: str, keys: tuple[str, ...], paragraphs: bool) -> Slice:
    place = Path(path)
    if not place.exists():
        raise ValueError(f"input={path} does not exist.")
    if place.is_dir():
        dataset = _dataset(path)
        _need_columns(path, keys, dataset.column_names)
        return Slice(path, DATASET, keys, size=dataset.select_columns(list(keys)).data.nbytes)
    try:
        with place.open("rb"):
            size = place.stat().st_size
    except OSError as error:
        raise ValueError(f"input={path} cannot be read ({error.strerror}).") from error
    if place.suffix == ".parquet":
        file = _parquet(path)
        _need_columns(path, keys, file.schema_arrow.names)
        return Slice(path, PARQUET, keys, size=size * _TYPICAL_COMPRESSION)
    compression = _compression(path)
    suffix = place.with_suffix("").suffix if compression else place.suffix
    if suffix not in _KINDS:
        raise ValueError(f"input={path}: unknown format {place.suffix or 'without extension'}. Supported: {SUPPORTED}.")
    if _KINDS[suffix] == TEXT:
        _need_columns(path, keys, ["text"])
    size *= _TYPICAL_COMPRESSION if compression else 1
    return Slice(path, _KINDS[suffix], keys, size=size, paragraphs=paragraphs)


def _cut(part: Slice, length: int, pieces: int, size: int) -> list[Slice]:
    """`part` as `pieces` ranges of about length / pieces."""
    edges = [length * i // pieces for i in range(pieces + 1)] if pieces else []
    return [replace(part, start=a, stop=b, size=size * (b - a) // length) for a, b in itertools.pairwise(edges)]


def _need_columns(path: str, keys: tuple[str, ...], there: list[str]) -> None:
    for key in keys:
        if key not in there:
            raise ValueError(f"json-keys={key} is not in {path}: it has {', '.join(there)}.")


# JSON lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(part: Slice) -> Iterator[Document | Broken]:
    """The lines that begin in [start, stop)."""
    with _open(part.path) as stream:
        position = part.start
        if position:
            # From one byte earlier: if that is a newline, `start` begins a line and nothing is lost.
            _skip(stream, position - 1)
            position += len(stream.readline()) - 1
        for line in stream:
            if part.stop is not None and position >= part.stop:
                return
            offset, position = position, position + len(line)
            if not line.isspace():
                yield _parse(line, part, offset)


def _parse(line: bytes, part: Slice, offset: int) -> Document | Broken:
    def broken(reason: str) -> Broken:
        return Broken(part.path, "line", offset, reason)

    try:
        record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return broken(f"not JSON: {error}")
    if not isinstance(record, dict):
        return broken(f"not a JSON object but {type(record).__name__}")
    for key in part.keys:
        if key not in record:
            return broken(f"no key {key!r}; the keys are {', '.join(map(repr, record)) or 'none'}")
    texts = tuple(record[key] for key in part.keys)
    for key, text in zip(part.keys, texts, strict=True):
        if not isinstance(text, str):
            return broken(f"{key!r} holds {type(text).__name__}, not text")
        # Half of an escaped surrogate pair is valid JSON but no text; escapes are rare enough to look only there.
        if (b"\\ud" in line or b"\\uD" in line) and not _encodes(text):
            return broken(f"{key!r} holds half a surrogate pair, which has no UTF-8")
    return Document(texts, len(line))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Plain text ------------------------------------------------------------------------------------------------------


def _read_text(part: Slice) -> Iterator[Document | Broken]:
    with _open(part.path) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Broken(part.path, "file", 0, f"not UTF-8 at byte {error.start}")
        return
    documents = re.split(r"(?:\r?\n[ \t]*){2,}", text) if part.paragraphs else [text]
    for document in documents:
        if document.strip():
            yield Document((document,), len(document.encode()))


# Columns ---------------------------------------------------------------------------------------------------------


def _read_parquet(part: Slice) -> Iterator[Document | Broken]:
    file = _parquet(part.path)
    row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    groups = list(range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop))
    # Without threads: the reader runs in forked processes, and Arrow's thread pool does not survive a fork.
    for batch in file.iter_batches(1024, row_groups=groups, columns=list(part.keys), use_threads=False):
        yield from _records(part, row, [batch.column(key).to_pylist() for key in part.keys])
        row += batch.num_rows


def _read_dataset(part: Slice) -> Iterator[Document | Broken]:
    dataset = _dataset(part.path).select_columns(list(part.keys))
    row = part.start
    for batch in dataset.select(range(part.start, len(dataset) if part.stop is None else part.stop)).iter(1024):
        columns = [batch[key] for key in part.keys]
        yield from _records(part, row, columns)
        row += len(columns[0])


def _records(part: Slice, row: int, columns: list[list]) -> Iterator[Document | Broken]:
    for i, texts in enumerate(zip(*columns, strict=True)):
        wrong = [(k, t) for k, t in zip(part.keys, texts, strict=True) if not isinstance(t, str)]
        if wrong:
            yield Broken(part.path, "row", row + i, f"{wrong[0][0]!r} holds {type(wrong[0][1]).__name__}, not text")
        else:
            yield Document(texts, sum(len(text.encode()) for text in texts))


def _parquet(path: str):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # Arrow's own errors derive from these
        raise ValueError(f"input={path} is not a parquet file ({error}).") from error


def _dataset(path: str):
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"input={path} is a directory, but not one that datasets can load ({error}). Supported: {SUPPORTED}."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"input={path} holds several splits: give one of {', '.join(f'{path}/{s}' for s in dataset)}.")
    return dataset


# Files -----------------------------------------------------------------------------------------------------------


def _compression(path: str) -> str | None:
    return _COMPRESSIONS.get(Path(path).suffix)


def _open(path: str) -> io.BufferedReader:
    compression = _compression(path)
    if compression is None:
        return open(path, "rb", buffering=1 << 20)
    import pyarrow

    # Arrow's decompressors read concatenated streams and, unlike zstandard's, notice a file that ends early.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), compression), 1 << 20)


def _skip(stream: io.BufferedReader, nbytes: int) -> None:
    if isinstance(stream.raw, io.FileIO):
        stream.seek(nbytes)
        return
    while nbytes > 0:
        nbytes -= len(stream.read(min(nbytes, 1 << 20))) or nbytes


def _decompressed_length(path: str) -> int:
    try:
        with _open(path) as stream:
            return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): replace the file, or leave it out.") from error


def _line_numbers(path: str, offsets: list[int]) -> Iterator[int]:
    """Numbers, from 1, of the lines that begin at ascending byte offsets of the decompressed file."""
    position, line = 0, 1
    with _open(path) as stream:
        for offset in offsets:
            while position < offset and (block := stream.read(min(offset - position, 1 << 20))):
                line += block.count(b"\n")
                position += len(block)
            yield line
