"""Fingerprints of tokenizers: a few values, stored beside a corpus and in a checkpoint, that can be compared.

`PREFIX.tokenizer.json` describes the tokenizer that made PREFIX.bin. Names and times of files do not matter: a copy of
a tokenizer is the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mor_megatron.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

SUFFIX = ".tokenizer.json"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that determines the ids of a text, and the origin of the tokenizer."""

    origin: str
    """`--tokenizer-model` as it was given; only for messages, not compared."""
    behaviour: dict[str, int | str | None]
    """`algorithm`, `vocab-size`, `end-of-document`, and digests of vocabulary, scores or merges, normalization."""

    def difference(self, other: Fingerprint) -> tuple[str, int | str | None, int | str | None] | None:
        """The first field that differs, with both values; None: both give every text the same ids."""
        for name in {**self.behaviour, **other.behaviour}:
            mine, theirs = self.behaviour.get(name), other.behaviour.get(name)
            if mine != theirs:
                return name, mine, theirs
        return None

    def to_json(self) -> str:
        """A text from which `parse` restores the fingerprint."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Restore a fingerprint. Raises ValueError if the text is not one."""
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("behaviour"), dict):
            raise ValueError("it is not a tokenizer fingerprint")
        return cls(str(content.get("origin")), content["behaviour"])


def fingerprint(tokenizer: Tokenizer) -> Fingerprint:
    """The fingerprint of a tokenizer. Tokenizers with equal fingerprints give every document the same ids."""
    parts = tokenizer.behaviour()
    shown = {name: part if isinstance(part, int | str | None) else _digest(part) for name, part in parts.items()}
    return Fingerprint(tokenizer.origin, shown)


def read_fingerprint(prefix: str) -> Fingerprint | None:
    """The fingerprint of a corpus; None if an older version, Megatron-LM, or no tokenizer made it.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(f"{prefix}{SUFFIX}")
    try:
        return Fingerprint.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again, or delete it to skip the check") from error


def common_fingerprint(prefixes: Iterable[str]) -> Fingerprint | None:
    """The common tokenizer of several corpora; None, with a notice, if the tokenizer of one is unknown.

    Raises:
        ValueError: two corpora were made with different tokenizers; names both, and the field that differs.
    """
    known, unknown, first = [], [], None
    for prefix in prefixes:
        made_with = read_fingerprint(prefix)
        (unknown if made_with is None else known).append(prefix)
        first = first or made_with
        if made_with is not None:
            require_same_tokenizer(prefix, made_with, known[0], first)
    if known and unknown:
        _notice(f"the tokenizer of {' '.join(unknown)} is unknown, that of {known[0]} is known")
    return None if unknown else first


def check_corpora(prefixes: Iterable[str], tokenizer: Tokenizer | None) -> None:
    """Refuse corpora that were made with another tokenizer than that of the run, or with different ones.

    Args:
        tokenizer: that of the run; if None, the corpora are only compared with each other.
    Raises:
        ValueError: names corpus, field, both values and the remedy.
    """
    if tokenizer is None:
        common_fingerprint(prefixes)
        return
    wanted, unknown = fingerprint(tokenizer), []
    for prefix in prefixes:
        made_with = read_fingerprint(prefix)
        if made_with is None:
            unknown.append(prefix)
        else:
            require_same_tokenizer(prefix, made_with, "this run", wanted)
    if unknown:
        _notice(
            f"the tokenizer of {' '.join(unknown)} is unknown (no {SUFFIX} beside it): "
            f"tokenizer-model={wanted.origin} is assumed"
        )


def require_same_tokenizer(prefix: str, made_with: Fingerprint, other: str, theirs: Fingerprint) -> None:
    """Refuse a corpus whose ids stand for other text. Raises ValueError."""
    difference = made_with.difference(theirs)
    if difference is not None:
        name, one, two = difference
        raise ValueError(
            f"{prefix} was made with another tokenizer, {made_with.origin}, than that of {other}, {theirs.origin} "
            f"({name}={one}, and {name}={two}): preprocess it again, or use its tokenizer"
        )


def _notice(message: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:  # every rank reads the same files
        logger.warning(message)


def _digest(part: object) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
