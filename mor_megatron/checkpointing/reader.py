"""Reads parameters out of a checkpoint's pieces: whole, or the run of elements that a rank of any layout needs.

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
from mor_megatron.checkpointing.pieces import BUFFER, STEP, WEIGHT, Cut, Piece

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
        self._pieces: dict[tuple[str, str, int], list[tuple[int, str, str]]] = defaultdict(list)
        self._open: dict[str, safe_open] = {}
        for file, stored in manifest.files.items():
            for key in stored.pieces:
                piece = Piece.parse(key)
                self.kinds[piece.name].add(piece.kind)
                self._pieces[piece.kind, piece.name, piece.share].append((piece.offset, key, file))
        for pieces in self._pieces.values():
            pieces.sort()

    def run(self, kind: str, name: str, share: int, begin: int, length: int) -> Tensor:
        """Elements [begin, begin + length) of one tensor-parallel share, fp32.

        Raises:
            ValueError: the checkpoint does not have all of them; names the first missing one.
        """
        spans, at, end = [], begin, begin + length
        for offset, key, file in self._pieces[kind, name, share]:
            if at >= end or offset > at:
                break
            stored = self._slice(file, key)
            stop = min(end, offset + stored.get_shape()[0])
            if stop > at:
                spans.append(stored[at - offset : stop - offset])
                at = stop
        if at < end:
            raise ValueError(f"{self.directory} lacks element {at} of {kind}/{name}, share {share}")
        return spans[0] if len(spans) == 1 else torch.cat(spans)

    def scalar(self, name: str) -> float:
        """The number of updates of a parameter."""
        return self.run(STEP, name, 0, 0, 1).item()

    def whole(self, kind: str, name: str) -> Tensor:
        """All of a parameter's weights or of one of its states, in the parameter's shape, vocabulary unpadded."""
        cut = self._cut(name)
        return cut.join([self.run(kind, name, share, 0, cut.share_numel) for share in range(cut.shares)])

    def run_of(self, kind: str, name: str, cut: Cut, rank: int, begin: int, length: int) -> Tensor:
        """Elements [begin, begin + length) of the share of `rank` in a layout that cuts the parameter as `cut` does.

        Raises:
            ValueError: the checkpoint's parameter has another shape, or is not there.
        """
        stored = self._cut(name)
        if stored.unpadded != cut.unpadded:
            raise ValueError(
                f"{name} has shape {list(cut.unpadded)}, and {list(stored.unpadded)} in {self.directory}: give the "
                "model the same settings"
            )
        share = 0 if cut.dim is None else rank
        if stored == cut:
            return self.run(kind, name, share, begin, length)
        return cut.cut(self.whole(kind, name), share).narrow(0, begin, length)

    def _cut(self, name: str) -> Cut:
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
                raise ValueError(f"{path}: {key} is no run of fp32 elements")
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
    """The same of buffers that belong to the model (the balancing bias of token-choice)."""
    return _read(directory, BUFFER)


def _read(directory: str | Path, kind: str) -> dict[str, Tensor]:
    reader = open_checkpoint(directory)
    if WHOLE[WEIGHT] in reader.manifest.files:
        return load_file(reader.directory / WHOLE[kind]) if WHOLE[kind] in reader.manifest.files else {}
    return {name: reader.whole(kind, name) for name in reader.manifest.parameters if kind in reader.kinds[name]}
