"""Reads parameters out of a checkpoint's shard entries: whole, or the elements that a rank of any layout needs.

Nothing here needs a process group, and nothing is unpickled.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mor_megatron.checkpointing.manifest import Manifest, damage, read_manifest
from mor_megatron.checkpointing.shards import BUFFER, STEP, WEIGHT, ShardEntry, Sharding

WHOLE = {WEIGHT: "model.safetensors", BUFFER: "buffers.safetensors"}
"""Files of a converted checkpoint: whole tensors by name."""


class CheckpointReader:
    """Random access to one checkpoint; files are mapped, not read, until an element is asked for.

    Args:
        directory: of one checkpoint (`iter_0000010`).
        manifest: its own.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest
        self.kinds: dict[str, set[str]] = defaultdict(set)
        """Name of a parameter or buffer -> kinds of state there are of it."""
        self._entries: dict[tuple[str, str, int], list[tuple[int, str, str]]] = defaultdict(list)
        self._open: dict[str, safe_open] = {}
        for file, stored in manifest.files.items():
            for key in stored.entries:
                entry = ShardEntry.parse(key)
                self.kinds[entry.name].add(entry.kind)
                self._entries[entry.kind, entry.name, entry.shard].append((entry.offset, key, file))
        for entries in self._entries.values():
            entries.sort()

    def read(self, kind: str, name: str, shard: int, begin: int, length: int) -> Tensor:
        """Elements [begin, begin + length) of one tensor-parallel shard, fp32.

        Raises:
            ValueError: the checkpoint does not have all of them; names the first missing one.
        """
        spans, at, end = [], begin, begin + length
        for offset, key, file in self._entries[kind, name, shard]:
            if at >= end or offset > at:
                break
            stored = self._slice(file, key)
            stop = min(end, offset + stored.get_shape()[0])
            if stop > at:
                spans.append(stored[at - offset : stop - offset])
                at = stop
        if at < end:
            raise ValueError(f"{self.directory} lacks element {at} of {kind}/{name}, shard {shard}")
        return spans[0] if len(spans) == 1 else torch.cat(spans)

    def require_entries(self) -> None:
        """Refuse a converted checkpoint, which has none.

        Raises:
            ValueError: it is one.
        """
        if WHOLE[WEIGHT] in self.manifest.files:
            raise ValueError(
                f"{self.directory} is a converted checkpoint, for other programs to read: give the one that it was "
                "made from"
            )

    def scalar(self, name: str) -> float:
        """The number of updates of a parameter."""
        return self.read(STEP, name, 0, 0, 1).item()

    def whole(self, kind: str, name: str) -> Tensor:
        """All of a parameter's weights or of one of its states, in the parameter's shape, vocabulary unpadded."""
        sharding = self._sharding(name)
        return sharding.join(
            [self.read(kind, name, shard, 0, sharding.shard_numel) for shard in range(sharding.shards)]
        )

    def read_for(self, sharding: Sharding, rank: int, kind: str, name: str, begin: int, length: int) -> Tensor:
        """Elements [begin, begin + length) of the shard that a tensor-parallel rank has in another layout.

        Args:
            sharding: how that layout divides the parameter.
            rank: tensor-parallel rank in it.
        Raises:
            ValueError: the checkpoint's parameter has another shape, or is not there.
        """
        stored = self._sharding(name)
        if stored.unpadded != sharding.unpadded:
            raise ValueError(
                f"{name} has shape {list(sharding.unpadded)}, and {list(stored.unpadded)} in {self.directory}: give "
                "the model the same settings"
            )
        shard = 0 if sharding.dim is None else rank
        if stored == sharding:
            return self.read(kind, name, shard, begin, length)
        return sharding.shard(self.whole(kind, name), shard).narrow(0, begin, length)

    def _sharding(self, name: str) -> Sharding:
        if name not in self.manifest.parameters:
            raise ValueError(f"{self.directory} has no {name}: give the model the same settings")
        return self.manifest.parameters[name]

    def _slice(self, file: str, key: str):
        path = self.directory / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, "pt")
            stored = self._open[file].get_slice(key)
            if stored.get_dtype() != "F32" or len(stored.get_shape()) != 1:
                raise ValueError(f"{path}: {key} is no vector of fp32 elements")
            return stored
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {key} cannot be read ({error})") from error


def open_checkpoint(directory: str | Path) -> CheckpointReader:
    """A checkpoint of any layout, after all its files have been compared with their checksums.

    Raises:
        ValueError: it is damaged, incomplete or of another format; names the file at fault.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    problem = damage(directory, manifest, list(manifest.files))
    if problem is not None:
        raise ValueError(problem)
    return CheckpointReader(directory, manifest)


def read_parameters(directory: str | Path) -> dict[str, Tensor]:
    """All weights of a checkpoint of any layout, whole, fp32, on the CPU; needs no process group.

    Args:
        directory: of one checkpoint (`iter_0000010`), or what `tools/checkpoint.py convert` made of one.
    Returns:
        Name -> tensor, vocabulary without padding; a tied head is not listed.
    Raises:
        ValueError: as `open_checkpoint`.
    """
    return _read(directory, WEIGHT)


def read_buffers(directory: str | Path) -> dict[str, Tensor]:
    """All buffers of a checkpoint that are state (the balancing bias of token-choice), whole; as `read_parameters`."""
    return _read(directory, BUFFER)


def _read(directory: str | Path, kind: str) -> dict[str, Tensor]:
    reader = open_checkpoint(directory)
    if WHOLE[WEIGHT] in reader.manifest.files:
        return load_file(reader.directory / WHOLE[kind]) if WHOLE[kind] in reader.manifest.files else {}
    return {name: reader.whole(kind, name) for name in reader.manifest.parameters if kind in reader.kinds[name]}
