"""The corpora of each split of the data and their proportions, from flags or from files that flags name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mor_megatron.config.run_schema import PATHS_PER_SPLIT, DataConfig

SPLITS = ("training", "validation", "test")
SOURCES = ("data_path", "data_args_path", *PATHS_PER_SPLIT, "per_split_data_args_path")
"""All fields that name corpora."""


@dataclass(frozen=True)
class Blend:
    """Corpora that form one split."""

    paths: tuple[str, ...]
    """Prefixes."""
    weights: tuple[float, ...] | None
    """Shares of the samples, not normalized; None: in proportion to tokens."""
    begin: float = 0.0
    """Start of the split's part of each corpus, as a fraction of its documents."""
    end: float = 1.0
    """End of that part."""

    def names(self) -> list[str]:
        """A short, distinct name for each corpus: as few of the last parts of its path as suffice."""
        parts = [Path(path).parts for path in self.paths]
        for length in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-length:]) for part in parts]
            if len(set(names)) == len(names):
                return names
        return [f"{path} ({number})" for number, path in enumerate(self.paths)]  # the same corpus twice


def read_blends(data: DataConfig) -> tuple[Blend | None, Blend | None, Blend | None]:
    """Training, validation and test corpora; None: the split has no corpus.

    Raises:
        ValueError: nothing is given, a file cannot be read, only some corpora have weights, or `split` is invalid.
    """
    if data.uses_split:
        words, flag = data.data_path, "data-path"
        if data.data_args_path is not None:
            words, flag = _read(data.data_args_path, "data-args-path").split(), f"data-args-path={data.data_args_path}:"
        paths, weights = parse_blend(words, flag)
        shares = data.proportions()
        edges = [sum(shares[:i]) / sum(shares) for i in range(4)]
        return tuple(Blend(paths, weights, begin, end) for begin, end in pairwise(edges))
    if data.per_split_data_args_path is not None:
        parts = _read_parts(data.per_split_data_args_path)
        flags = [f"{name} of per-split-data-args-path={data.per_split_data_args_path}:" for name in _KEYS]
    else:
        parts = [getattr(data, field) for field in PATHS_PER_SPLIT]
        flags = [field.replace("_", "-") for field in PATHS_PER_SPLIT]
    return tuple(Blend(*parse_blend(part, flag)) if part else None for part, flag in zip(parts, flags, strict=True))


def corpus_sizes(data: DataConfig) -> dict[str, int]:
    """Size in bytes of the tokens of each corpus that the settings name, by prefix; empty if they name no data."""
    if not any(getattr(data, field) for field in SOURCES):
        return {}
    paths = {path for blend in read_blends(data) if blend is not None for path in blend.paths}
    return {path: file.stat().st_size for path in sorted(paths) if (file := Path(f"{path}.bin")).is_file()}


def data_arguments(data: DataConfig) -> str | None:
    """What stands in the file that names the corpora, on one line; None without such a file.

    Raises:
        ValueError: it cannot be read.
    """
    for field in ("data_args_path", "per_split_data_args_path"):
        path = getattr(data, field)
        if path is not None:
            return " ".join(_read(path, field.replace("_", "-")).split())
    return None


def parse_blend(words: Sequence[str], flag: str = "data-path") -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """`p`, `p1 p2 ...` or `w1 p1 w2 p2 ...` as paths and weights (None: in proportion to tokens).

    Raises:
        ValueError: nothing is given, only some paths have weights, or a weight is not positive.
    """
    if not words:
        raise ValueError(f"{flag} is empty: give the prefix of a corpus, or weight prefix weight prefix ...")
    shown = f"{flag}{' ' if flag.endswith(':') else '='}{' '.join(words)}"
    numeric = [_number(word) is not None for word in words]
    if not any(numeric):
        return tuple(words), None
    if len(words) % 2 or not all(numeric[::2]) or any(numeric[1::2]):
        raise ValueError(f"{shown} must be weight prefix weight prefix ..., or prefixes only.")
    weights = tuple(float(word) for word in words[::2])
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"{shown}: every weight must be positive; leave out a corpus instead.")
    return tuple(words[1::2]), weights


_KEYS = ("train", "valid", "test")


def _read_parts(path: str) -> list[Sequence[str]]:
    """Read Megatron-LM's file: an object with train, valid and test, each a list of words or one string of words."""
    flag = f"per-split-data-args-path={path}"
    try:
        parts = json.loads(_read(path, "per-split-data-args-path"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not valid JSON (line {error.lineno}: {error.msg}): correct it there") from error
    if not isinstance(parts, dict) or not set(parts) <= set(_KEYS):
        raise ValueError(f'{flag} must be a JSON object {{"train": [...], "valid": [...], "test": [...]}}')
    words = [part.split() if isinstance(part, str) else part for part in (parts.get(key) or [] for key in _KEYS)]
    if not all(isinstance(part, list) for part in words):
        raise ValueError(f"{flag}: each split must be a list of prefixes, or of weight prefix weight prefix ...")
    return [[str(word) for word in part] for part in words]


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{flag}={path} cannot be read ({reason}): give a file of data arguments") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
