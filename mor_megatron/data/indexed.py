"""Megatron-core's indexed corpora (PREFIX.bin and PREFIX.idx): write completely or not at all, check, merge, verify.

Layout of PREFIX.idx (megatron/core/datasets/indexed_dataset.py): magic (9 bytes), version 1 (u64), dtype code (u8),
number of sequences n (u64), number of document bounds d (u64), lengths int32[n], byte pointers int64[n], document
bounds int64[d]; a multimodal corpus adds modes int8[n]. PREFIX.bin is the token ids, one sequence after another.
"""

from __future__ import annotations

import glob
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDatasetBuilder

from mor_megatron.data.fingerprint import SUFFIX, Fingerprint, common_fingerprint

_HEADER_BYTES = 34
# Number of tokens read at once when a whole corpus is scanned.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Index:
    """The content of PREFIX.idx: dtype of a token, `lengths` [n] in tokens, byte `pointers` [n], `bounds` [d]."""

    dtype: type[np.integer]
    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray
    multimodal: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens in the corpus."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def documents(self) -> int:
        """Number of documents in the corpus; each is one sequence unless another tool split it."""
        return len(self.bounds) - 1


class CorpusWriter:
    """Builds a corpus in `folder` and moves it to its final name when it is complete."""

    def __init__(self, folder: str, name: str, dtype: type[np.integer]):
        # No suffix .idx before the end: a run that dies must not leave files that look like a corpus.
        self._bin, self._idx = f"{folder}/{name}.bin.partial", f"{folder}/{name}.idx.partial"
        self._builder = IndexedDatasetBuilder(self._bin, dtype=dtype)

    def append(self, tokens_path: str, lengths: np.ndarray) -> None:
        """Add documents: a file of their token ids in the corpus's dtype, and their lengths in tokens, [documents]."""
        with open(tokens_path, "rb") as tokens:
            shutil.copyfileobj(tokens, self._builder.data_file, 1 << 22)
        first = len(self._builder.sequence_lengths)
        self._builder.sequence_lengths.extend(lengths.tolist())
        self._builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))

    def append_corpus(self, prefix: str) -> None:
        """Add all documents of a finished corpus of the same dtype."""
        self._builder.add_index(prefix)

    def publish(self, prefix: str, made_with: Fingerprint | None) -> None:
        """Write the index, then give all files their final names, PREFIX.idx last.

        Args:
            made_with: the fingerprint of the tokenizer; None if it is unknown.
        """
        self._builder.data_file.flush()
        os.fsync(self._builder.data_file.fileno())
        self._builder.finalize(self._idx)
        # An older index must not be seen beside the new tokens.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        Path(f"{prefix}{SUFFIX}").unlink(missing_ok=True)
        if made_with is not None:
            partial = Path(f"{self._idx}{SUFFIX}")
            partial.write_text(made_with.to_json(), encoding="utf-8")
            os.replace(partial, f"{prefix}{SUFFIX}")
        os.replace(self._bin, f"{prefix}.bin")
        os.replace(self._idx, f"{prefix}.idx")


def working_folder(output_prefix: str) -> tempfile.TemporaryDirectory:
    """A folder beside the output, on the same file system, that is removed when the work ends or fails.

    Raises:
        ValueError: the directory cannot be written.
    """
    target = Path(output_prefix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent)
    except OSError as error:
        raise cannot_write(output_prefix, error) from error


def cannot_write(output_prefix: str, error: OSError) -> ValueError:
    """The error to report when writing fails: a full disk, a quota, missing permissions."""
    return ValueError(
        f"output-prefix={output_prefix} cannot be written ({error.strerror or error}): free space or set permissions "
        "there, or choose another directory. No output was left behind."
    )


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype Megatron-LM gives a corpus of this vocabulary: uint16 below 65500, else int32."""
    return DType.optimal_dtype(vocab_size)


def read_index(prefix: str, may_be_empty: bool = False) -> Index:
    """Map PREFIX.idx into memory after cheap checks: header, and sizes of both files.

    Args:
        prefix: the corpus.
        may_be_empty: whether the corpus may have no sequence, as a shard may.
    Raises:
        ValueError: a file is missing, the header is invalid, or sizes disagree; names file and offset.
    """
    idx, data = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx, data):
        if not os.path.isfile(path):
            made = sorted(found.removesuffix(".idx") for found in glob.glob(f"{glob.escape(prefix)}_*_document.idx"))
            remedy = f"did you mean {' or '.join(made)}?" if made else "give a corpus's prefix, without .bin or .idx."
            raise ValueError(f"{path} does not exist: {remedy}")
    size = os.path.getsize(idx)
    with open(idx, "rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise ValueError(f"{idx} ends at byte {size}, inside its header of {_HEADER_BYTES}: {_AGAIN}")
    magic, version, code, n, d = struct.unpack("<9sQBQQ", header)
    if magic != _INDEX_HEADER:
        raise ValueError(f"{idx} does not begin with {_INDEX_HEADER!r} at byte 0: it is not a Megatron index. {_AGAIN}")
    if version != 1:
        raise ValueError(f"{idx} has version {version} at byte 9, not 1: {_AGAIN}")
    if code not in {member.value for member in DType} or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        raise ValueError(f"{idx} has dtype code {code} at byte 17, which is no integer type: {_AGAIN}")
    expected = _HEADER_BYTES + 12 * n + 8 * d
    if size not in (expected, expected + n):  # + n: the modes of a multimodal corpus
        raise ValueError(f"{idx} has {size} bytes, but {n} sequences and {d} document bounds take {expected}: {_AGAIN}")
    dtype = DType.dtype_from_code(code)
    if n == 0:
        if may_be_empty:
            return Index(dtype, np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(1, np.int64))
        raise ValueError(f"{idx} contains no sequence: {_AGAIN}")
    lengths = np.memmap(idx, np.int32, "r", _HEADER_BYTES, (n,))
    pointers = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 4 * n, (n,))
    bounds = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 12 * n, (d,)) if d else np.zeros(0, np.int64)
    end = int(pointers[-1]) + int(lengths[-1]) * DType.size(dtype)
    if os.path.getsize(data) != end:
        raise ValueError(
            f"{data} ends at byte {os.path.getsize(data)}, but according to {idx} its last sequence ends at byte "
            f"{end}: {_AGAIN}"
        )
    return Index(dtype, lengths, pointers, bounds, multimodal=size == expected + n)


_AGAIN = "write the corpus again, or copy both files again."


def read_tokens(prefix: str, index: Index) -> np.ndarray:
    """All token ids of PREFIX.bin, [tokens], mapped into memory."""
    return np.memmap(f"{prefix}.bin", index.dtype, "r") if index.tokens else np.zeros(0, index.dtype)


def verify(prefix: str, vocab_size: int | None = None) -> Iterator[str]:
    """Read a whole corpus and describe its faults; the list is empty if it has none.

    Args:
        prefix: the corpus.
        vocab_size: if given, every token must be in [0, vocab_size).
    """
    try:
        index = read_index(prefix)
    except ValueError as error:
        yield str(error)
        return
    idx, n = f"{prefix}.idx", len(index.lengths)
    size = DType.size(index.dtype)
    bad = np.flatnonzero(index.lengths < 0)
    if len(bad):
        yield f"{idx}: sequence {bad[0]} has length {index.lengths[bad[0]]} at byte {_HEADER_BYTES + 4 * bad[0]}."
        return
    begins = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)[:-1])) * size
    bad = np.flatnonzero(index.pointers != begins)
    if len(bad):
        place = _HEADER_BYTES + 4 * n + 8 * bad[0]
        yield (
            f"{idx}: sequence {bad[0]} points to byte {index.pointers[bad[0]]} of the .bin, but the lengths before it "
            f"add up to {begins[bad[0]]} (at byte {place})."
        )
        return
    bounds = index.bounds
    steps = np.flatnonzero(np.diff(bounds) < 0)
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != n or len(steps):
        where = int(steps[0]) + 1 if len(steps) else (0 if len(bounds) == 0 or bounds[0] != 0 else len(bounds) - 1)
        place = _HEADER_BYTES + 12 * n + 8 * where
        yield f"{idx}: document bounds must rise from 0 to {n}; bound {where} at byte {place} does not."
    if vocab_size is not None:
        yield from _out_of_range(prefix, index, vocab_size)


def _out_of_range(prefix: str, index: Index, vocab_size: int) -> Iterator[str]:
    tokens = read_tokens(prefix, index)
    count, first = 0, -1
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        bad = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if len(bad) and first < 0:
            first = start + int(bad[0])
        count += len(bad)
    if count:
        offset = first * DType.size(index.dtype)
        sequence = int(np.searchsorted(index.pointers, offset, side="right")) - 1
        yield (
            f"{prefix}.bin: {count} of {len(tokens)} tokens are outside [0, {vocab_size}); the first is "
            f"{tokens[first]} at byte {offset} (sequence {sequence})."
        )


def merge(prefixes: list[str], output_prefix: str) -> Index:
    """Concatenate corpora, in the given order. Shards without documents are skipped.

    Returns:
        The index of the new corpus.
    Raises:
        ValueError: there is nothing to merge, an input is damaged, multimodal or equal to the output, inputs have
            different dtypes or tokenizers, or the disk is full.
    """
    if not prefixes:
        raise ValueError("input names no corpus: give prefixes, or a directory with .bin and .idx files.")
    if any(os.path.abspath(p) == os.path.abspath(output_prefix) for p in prefixes):
        raise ValueError(f"output-prefix={output_prefix} is also an input: choose another name.")
    indexes = {prefix: read_index(prefix, may_be_empty=True) for prefix in prefixes}
    first, dtype = prefixes[0], indexes[prefixes[0]].dtype
    for prefix, index in indexes.items():
        if index.dtype is not dtype:
            raise ValueError(
                f"{prefix} has dtype {index.dtype.__name__} and {first} {dtype.__name__}: their vocabularies differ "
                "in size. Preprocess both with one tokenizer."
            )
        if index.multimodal:
            raise ValueError(f"{prefix} is multimodal and would lose its modes: merge it with Megatron-LM's tool.")
    if not any(len(index.lengths) for index in indexes.values()):
        raise ValueError(f"input={' '.join(prefixes)} contains no document: there is nothing to merge.")
    made_with = common_fingerprint(prefixes)
    with working_folder(output_prefix) as folder:
        try:
            writer = CorpusWriter(folder, Path(output_prefix).name, dtype)
            for prefix in prefixes:
                if len(indexes[prefix].lengths):
                    writer.append_corpus(prefix)
            writer.publish(output_prefix, made_with)
        except OSError as error:
            raise cannot_write(output_prefix, error) from error
    return read_index(output_prefix)


def prefixes_in(folder: str) -> list[str]:
    """Prefixes of the corpora in a directory, sorted by name (as in Megatron-LM's merge tool).

    Raises:
        ValueError: a .bin has no .idx, or the reverse.
    """
    found = {p.with_suffix("") for p in Path(folder).iterdir() if p.suffix in (".bin", ".idx")}
    for prefix in found:
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ValueError(f"{prefix}{suffix} is missing: complete the pair, or move the other file away.")
    return sorted(str(prefix) for prefix in found)
