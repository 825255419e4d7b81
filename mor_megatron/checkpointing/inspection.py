"""What a checkpoint is, in words, and everything that is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mor_megatron.checkpointing.manifest import Manifest, damage, read_manifest
from mor_megatron.checkpointing.reader import WHOLE
from mor_megatron.checkpointing.shards import BUFFER, STEP, WEIGHT, ShardEntry


def verify(directory: str | Path) -> Iterator[str]:
    """Read a whole checkpoint and describe what is wrong with it: nothing, for an intact one.

    Beyond what loading looks at (size and checksum of every file), the shard entries must make up every parameter once.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        yield str(error)
        return
    lengths: dict[str, int] = {}
    problems = []
    for name, stored in manifest.files.items():
        problem = damage(directory, manifest, [name])
        if problem is not None:
            problems.append(problem)
        elif stored.entries:
            try:
                with safe_open(directory / name, "pt") as file:
                    lengths |= {key: file.get_slice(key).get_shape()[0] for key in stored.entries}
            except (SafetensorError, IndexError) as error:
                problems.append(f"{directory / name} does not hold what the manifest lists ({error})")
    yield from problems or _gaps(directory, manifest, lengths)  # a damaged file leaves gaps


def _gaps(directory: Path, manifest: Manifest, lengths: dict[str, int]) -> Iterator[str]:
    spans_of: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    for key, length in lengths.items():
        entry = ShardEntry.parse(key)
        spans = spans_of.setdefault((entry.kind, entry.name, entry.shard), [])
        spans.append((entry.offset, entry.offset + length))
    kinds = {(kind, name) for kind, name, _ in spans_of}
    for name, sharding in manifest.parameters.items():
        wanted = {kind for kind, other in kinds if other == name}
        if not wanted & {WEIGHT, BUFFER} and WHOLE[WEIGHT] not in manifest.files:
            yield f"{directory} has no weights of {name}"
        for kind in sorted(wanted):
            for shard in range(1 if kind == STEP else sharding.shards):
                spans = sorted(spans_of.get((kind, name, shard), []))
                end = 1 if kind == STEP else sharding.shard_numel
                edges = [(0, 0), *spans, (end, end)]
                bad = next((a[1] for a, b in pairwise(edges) if a[1] != b[0]), None)
                if bad is not None:
                    yield f"{directory}: {kind}/{name}, shard {shard}, is not whole at element {bad}"


def describe(directory: str | Path) -> str:
    """Model, progress, layout, sizes.

    Raises:
        ValueError: it has no intact manifest.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    weights = sum(math.prod(sharding.unpadded) for sharding in manifest.parameters.values())
    size = sum(stored.size for stored in manifest.files.values())
    kinds = sorted({ShardEntry.parse(key).kind for stored in manifest.files.values() for key in stored.entries})

    def shown(values: dict) -> str:
        return "  ".join(f"{name}={value}" for name, value in values.items())

    rows = {
        "progress": shown(manifest.progress),
        "model": shown(manifest.model),
        "optimizer": manifest.optimizer,
        "parameters": f"{weights:,} in {len(manifest.parameters)} tensors; {' '.join(kinds) or 'weights only'}",
        "written by": shown(manifest.layout),
        "versions": shown(manifest.versions),
        "tokenizer": "none"
        if manifest.tokenizer is None
        else f"{manifest.tokenizer['type']} {manifest.tokenizer['model']}",
        "files": f"{len(manifest.files)}, {size / 1e6:,.1f} MB",
    }
    return "\n".join([str(directory), *(f"  {name:10}  {value}" for name, value in rows.items())])
