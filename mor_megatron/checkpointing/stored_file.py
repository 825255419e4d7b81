"""A file of a checkpoint: written to the disk and hashed in one pass. Tensor files are safetensors, of fp32 entries.

The library's own writer wants each tensor as bytes first, which would be a second copy of the state, and the file read
once more for its checksum. Reading is the library's (`safetensors.safe_open`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mor_megatron.files import flush

ITEM_BYTES = 4
_CHUNK = 1 << 22  # what is hashed is still in the cache when it is written


@dataclass(frozen=True)
class StoredFile:
    """What went to the disk."""

    size: int
    """Bytes."""
    checksum: str
    """XXH3, 128 bits, hexadecimal."""
    entries: tuple[str, ...] = ()
    """Names of the tensors in it; none if it is no tensor file."""


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> StoredFile:
    """Write tensors, and return when they are on the disk.

    Args:
        path: must not exist.
        tensors: key and [n] fp32, on any device; moved to the CPU one at a time.
    Raises:
        OSError: no space, no rights.
    """
    tensors = list(tensors)
    header, end = {}, 0
    for key, tensor in tensors:
        assert tensor.dtype == torch.float32, key
        assert tensor.ndim == 1, key
        begin, end = end, end + ITEM_BYTES * tensor.numel()
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    digest = xxhash.xxh3_128()
    with path.open("xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for _, tensor in tensors:
            data = memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B")
            for begin in range(0, len(data), _CHUNK):
                chunk = data[begin : begin + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
        flush(file)
        size = file.tell()
    return StoredFile(size, digest.hexdigest(), tuple(header))


def write_text(path: Path, text: str) -> StoredFile:
    """Write a file of text, and return when it is on the disk."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> StoredFile:
    """Write any small file, and return when it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        flush(file)
    return StoredFile(len(data), xxhash.xxh3_128_hexdigest(data))


def checksum_of(path: Path) -> str:
    """XXH3 of a whole file, as in `StoredFile.checksum`.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
