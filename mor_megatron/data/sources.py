"""Read documents from JSONL (.gz and .zst too), parquet, plain text and Hugging Face dataset directories.

`read` yields the documents of one slice of the input; `planning.py` makes the slices. The content of a slice does not
depend on the worker that reads it, so a corpus does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

JSONL, TEXT, PARQUET, DATASET = "jsonl", "text", "parquet", "dataset"
_KINDS = {".jsonl": JSONL, ".json": JSONL, ".ndjson": JSONL, ".txt": TEXT, ".text": TEXT, ".md": TEXT}  # or compressed
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUPPORTED = (
    "JSON lines (.jsonl .json .ndjson), plain text (.txt .text .md), either compressed (.gz .zst), .parquet, a "
    "directory of such files or one written by datasets' save_to_disk, a pattern, or - for JSON lines on standard input"
)
# Marks a directory as a dataset.
DATASET_FILES = ("state.json", "dataset_dict.json")
# Number of broken records that a report shows; all are counted.
SHOWN = 10
# Number of records that are checked before the work starts.
_PROBE = 100


@dataclass(frozen=True)
class Slice:
    """A part of one input: bytes of the decompressed file (jsonl), row groups (parquet) or rows (dataset).

    `stop` None means to the end; it is used for files that can only be read as a whole. `size` is bytes of input, exact
    for JSONL without compression, otherwise an estimate.
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
    """One document: a text for each key, and its size in bytes of input."""

    texts: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used. `position` is the byte offset of a line, or the row number, from 0."""

    path: str
    unit: str  # "line", "row" or "file"
    position: int
    reason: str


def read(part: Slice) -> Iterator[Document | Broken]:
    """Yield the documents of a slice, in order, with a `Broken` for each record that contains none.

    Raises:
        ValueError: the file itself is damaged, such as compressed data that ends early.
    """
    readers = {JSONL: _read_jsonl, TEXT: _read_text, PARQUET: _read_parquet, DATASET: _read_dataset}
    with _readable(part.path):
        yield from readers[part.kind](part)


def describe(broken: list[Broken]) -> list[str]:
    """`file:line: reason` for each record. Counts lines up to the byte offsets, so it reads these files again."""
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


def skipped(empty: int, broken_count: int, broken: list[str]) -> list[str]:
    """Describe what was skipped, as lines of text; `broken` describes the first of `broken_count` records."""
    lines = [f"skipped {empty:,} empty texts"] if empty else []
    if broken_count:
        lines.append(f"skipped {broken_count:,} broken records:")
        lines += [f"  {line}" for line in broken]
        if broken_count > len(broken):
            lines.append(f"  and {broken_count - len(broken):,} more")
    return lines


def require_usable(parts: Iterable[Slice]) -> None:
    """Check the first records: if none of them is usable, the settings are wrong, not the data.

    Raises:
        ValueError: none is usable; names the first record.
    """
    first = list(itertools.islice(itertools.chain.from_iterable(map(read, parts)), _PROBE))
    if first and all(isinstance(item, Broken) for item in first):
        raise ValueError(
            f"none of the first {len(first)} records can be used: {describe(first[:1])[0]}. Check the key and the "
            "format."
        )


def kind_of(path: str | Path) -> str | None:
    """JSONL, TEXT or PARQUET by the name of a file, in any case; None: unknown format."""
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        return PARQUET
    return _KINDS.get((path.with_suffix("") if compression(path) else path).suffix.lower())


# JSON lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(part: Slice) -> Iterator[Document | Broken]:
    """Yield the lines that begin in [start, stop)."""
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
    try:
        texts = tuple(_field(record, key) for key in part.keys)
    except KeyError as missing:
        return broken(f"no key {missing}; the keys are {', '.join(map(repr, _names(record))) or 'none'}")
    for key, text in zip(part.keys, texts, strict=True):
        if not isinstance(text, str):
            return broken(f"{key!r} holds {type(text).__name__}, not text")
        # Half of an escaped surrogate pair is valid JSON but not text; escapes are rare, so only these are checked.
        if (b"\\ud" in line or b"\\uD" in line) and not _encodes(text):
            return broken(f"{key!r} holds half a surrogate pair, which has no UTF-8")
    return Document(texts, len(line))


def _field(record: dict, key: str) -> object:
    """The value of a key, or for `a.b` of the key b of the object under a. Raises KeyError."""
    if key in record:
        return record[key]
    value: object = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(key)
        value = value[name]
    return value


def _names(record: dict) -> list[str]:
    """The keys of a record, and with a dot those one level below."""
    below = [(key, value if isinstance(value, dict) else {}) for key, value in record.items()]
    return [name for key, value in below for name in ([f"{key}.{inner}" for inner in value] or [key])]


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
        elif not part.paragraphs:
            yield Document(("",), len(raw))  # an empty file is an empty document


# Columns ---------------------------------------------------------------------------------------------------------


def _read_parquet(part: Slice) -> Iterator[Document | Broken]:
    import pyarrow

    file, _ = open_parquet(part.path, part.keys)
    row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    groups = list(range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop))
    # Without threads: the reader runs in forked processes, and Arrow's thread pool does not survive a fork.
    for batch in file.iter_batches(1024, row_groups=groups, columns=list(part.keys), use_threads=False):
        table = _flat(pyarrow.Table.from_batches([batch]), part.keys)
        yield from _records(part, row, [table.column(key).to_pylist() for key in part.keys])
        row += batch.num_rows


def _read_dataset(part: Slice) -> Iterator[Document | Broken]:
    dataset = open_dataset(part.path, part.keys).select_columns(list(part.keys))
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


def _flat(table, keys: tuple[str, ...]):
    """An Arrow table in which fields of structs are columns, `a.b`, as deep as the keys need."""
    import pyarrow

    while not set(keys) <= set(table.column_names) and any(map(pyarrow.types.is_struct, table.schema.types)):
        table = table.flatten()
    return table


def open_parquet(path: str, keys: tuple[str, ...]):
    """The file and the names of its columns, including those inside structs if a key is not a column itself.

    Raises:
        ValueError: the file is not parquet.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        return file, _flat(file.schema_arrow.empty_table(), keys).column_names
    except (OSError, ValueError) as error:  # Arrow's own errors derive from these
        raise ValueError(f"input={path} is not a parquet file ({error}).") from error


def open_dataset(path: str, keys: tuple[str, ...]):
    """The dataset in a directory, with fields of structs as columns if a key is not a column itself.

    Raises:
        ValueError: the directory contains no dataset, or several splits.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"input={path} is a directory, but not one that datasets can load ({error}). Supported: {SUPPORTED}."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(
            f"input={path} contains several splits: give one of {', '.join(f'{path}/{s}' for s in dataset)}."
        )
    return dataset if set(keys) <= set(dataset.column_names) else dataset.flatten()


# Files -----------------------------------------------------------------------------------------------------------


def compression(path: str | Path) -> str | None:
    """Arrow's name of the compression, by the name of the file; None: not compressed."""
    return _COMPRESSIONS.get(Path(path).suffix.lower())


def first_bytes(path: str) -> bytes:
    """The first 4096 bytes, decompressed. Raises ValueError if the file is damaged."""
    with _readable(path), _open(path) as stream:
        return stream.read(1 << 12)


def _open(path: str) -> io.BufferedReader:
    codec = compression(path)
    if codec is None:
        return open(path, "rb", buffering=1 << 20)
    import pyarrow

    # Arrow's decompressors read concatenated streams and, unlike zstandard's, notice a file that ends early.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), codec), 1 << 20)


def _skip(stream: io.BufferedReader, nbytes: int) -> None:
    if isinstance(stream.raw, io.FileIO):
        stream.seek(nbytes)
        return
    while nbytes > 0:
        nbytes -= len(stream.read(min(nbytes, 1 << 20))) or nbytes


def decompressed_length(path: str) -> int:
    """Decompressed size in bytes; takes as long as decompressing. Raises ValueError if the file is damaged."""
    with _readable(path), _open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the decompressors also report damage as OSError
        raise ValueError(f"{path} cannot be read ({error}): replace the file, or leave it out of the input.") from error


def _line_numbers(path: str, offsets: list[int]) -> Iterator[int]:
    """Line numbers, from 1, of the lines that begin at ascending byte offsets of the decompressed file."""
    position, line = 0, 1
    with _open(path) as stream:
        for offset in offsets:
            while position < offset and (block := stream.read(min(offset - position, 1 << 20))):
                line += block.count(b"\n")
                position += len(block)
            yield line
