"""Shards of a corpus: made separately, on several machines, and joined to the corpus that one machine would make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mor_megatron.data.sources import Slice

ORIGIN = ".shard.json"
"""Suffix of the file beside a shard that describes the whole input; it is equal for all shards of one input."""


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `I/N`, shard I of N, counted from 1.

    Raises:
        ValueError: the text has another form.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard={text} is not I/N: give shard I of N, from 1/N to N/N.")
    return int(number), int(count)


def shard_of(parts: Sequence[Slice], number: int, count: int) -> list[Slice]:
    """Shard `number` of `count`. Shards have about equal bytes of input; in order, they are the whole input.

    The boundaries depend only on the sizes of the files, their order, and `count`. JSON lines are divided between
    lines, parquet between row groups, datasets between rows; compressed JSON lines and plain text only between files.

    Raises:
        ValueError: the input cannot be divided into so many shards.
    """
    whole_files = sum(part.stop is None for part in parts)
    if whole_files == len(parts) < count:
        raise ValueError(
            f"shard={number}/{count}: compressed JSON lines and plain text are divided between files only, and the "
            f"input has {whole_files}: use --shard I/{whole_files}, or decompress them."
        )
    sizes = [max(part.size, 1) for part in parts]
    begin, end = (sum(sizes) * edge // count for edge in (number - 1, number))
    chosen, offset = [], 0
    for part, size in zip(parts, sizes, strict=True):
        units = 1 if part.stop is None else part.stop - part.start
        first, last = (min(max(-((offset - edge) * units // size), 0), units) for edge in (begin, end))
        if part.stop is None and first < last:
            chosen.append(part)
        elif first < last:
            place = {"start": part.start + first, "stop": part.start + last}
            chosen.append(replace(part, size=part.size * (last - first) // units, **place))
        offset += size
    return chosen


def origin(parts: Sequence[Slice], **flags: object) -> str:
    """Everything that determines the shards of an input except their number: files in order, their sizes, and flags."""
    files = [(Path(part.path).name, part.kind, part.size, part.keys, part.paragraphs) for part in parts]
    digest = hashlib.sha256(json.dumps([files, flags], sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps({"inputs": len(parts), "bytes": sum(part.size for part in parts), "digest": digest}) + "\n"


def shard_prefix(prefix: str, shard: tuple[int, int] | None) -> str:
    """Prefix of shard = (i, n), counted from 1, until the shards are merged; None: the whole corpus."""
    return prefix if shard is None else f"{prefix}.shard-{shard[0]:05d}-of-{shard[1]:05d}"


def shards_of(prefix: str, count: int) -> list[str]:
    """Prefixes of all shards of a corpus, in order.

    Raises:
        ValueError: shards are missing, or are not shards of the same input; names them.
    """
    shards = {f"{number}/{count}": shard_prefix(prefix, (number, count)) for number in range(1, count + 1)}
    missing = [n for n, path in shards.items() if not all(Path(f"{path}{s}").is_file() for s in (".idx", ORIGIN))]
    if missing:
        raise ValueError(
            f"shards={count}: {', '.join(missing)} of {prefix} are missing: run preprocess_data.py with --shard "
            f"{missing[0]}{' and so on' if len(missing) > 1 else ''} again."
        )
    origins = {name: Path(f"{path}{ORIGIN}").read_text(encoding="utf-8") for name, path in shards.items()}
    others = [name for name, origin in origins.items() if origin != origins[f"1/{count}"]]
    if others:
        raise ValueError(
            f"shards={count}: {', '.join(others)} of {prefix} are from another input, or were made with other flags, "
            f"than 1/{count} ({origins[others[0]].strip()}, and {origins[f'1/{count}'].strip()}): make all again."
        )
    return list(shards.values())
