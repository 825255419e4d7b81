"""What a tokenizer does, as a few values that lie beside a corpus and in a checkpoint, to be compared.

`PREFIX.tokenizer.json` says with which tokenizer PREFIX.bin was made. Files, their names and their times do not matter:
a copy of a tokenizer is the same tokenizer.
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
    """All that decides which ids a text gets, and where it came from."""

    origin: str
    """`--tokenizer-model` as it was given; for people, and not compared."""
    behaviour: dict[str, int | str | None]
    """`algorithm`, `vocab-size`, `end-of-document`, and digests of vocabulary, scores or merges, normalisation."""

    def difference(self, other: Fingerprint) -> tuple[str, int | str | None, int | str | None] | None:
        """The first field that differs, its value here and there; None: both give every text the same ids."""
        for name in {**self.behaviour, **other.behaviour}:
            mine, theirs = self.behaviour.get(name), other.behaviour.get(name)
            if mine != theirs:
                return name, mine, theirs
        return None

    def to_json(self) -> str:
        """Text that `parse` turns back into an equal fingerprint."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Raises ValueError if it is no fingerprint."""
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("behaviour"), dict):
            raise ValueError("it is no fingerprint of a tokenizer")
        return cls(str(content.get("origin")), content["behaviour"])


def fingerprint(tokenizer: Tokenizer) -> Fingerprint:
    """Of a tokenizer in memory; two that give some text other ids, or end documents otherwise, have different ones."""
    parts = tokenizer.behaviour()
    shown = {name: part if isinstance(part, int | str | None) else _digest(part) for name, part in parts.items()}
    return Fingerprint(tokenizer.origin, shown)


def read_fingerprint(prefix: str) -> Fingerprint | None:
    """That of a corpus; None for one of an older version, of Megatron-LM, or of no tokenizer.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(f"{prefix}{SUFFIX}")
    try:
        return Fingerprint.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again, or delete it to do without it") from error


def common_fingerprint(prefixes: Iterable[str]) -> Fingerprint | None:
    """The tokenizer of several corpora; None, and a notice, if one of them does not say which it is.

    Raises:
        ValueError: two were made with different tokenizers; names both, and the field that differs.
    """
    known, unknown, first = [], [], None
    for prefix in prefixes:
        made_with = read_fingerprint(prefix)
        (unknown if made_with is None else known).append(prefix)
        first = first or made_with
        if made_with is not None:
            require_same_tokenizer(prefix, made_with, known[0], first)
    if known and unknown:
        _notice(f"{' '.join(unknown)} does not say which tokenizer it was made with, {known[0]} does")
    return None if unknown else first


def check_corpora(prefixes: Iterable[str], tokenizer: Tokenizer | None) -> None:
    """Refuse corpora that were made with another tokenizer than the run's, or than each other.

    Args:
        tokenizer: the run's; None: only that they agree can be checked.
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
            f"{' '.join(unknown)} does not say which tokenizer it was made with (no {SUFFIX} beside it): "
            f"tokenizer-model={wanted.origin} is taken on trust"
        )


def require_same_tokenizer(prefix: str, made_with: Fingerprint, other: str, theirs: Fingerprint) -> None:
    """Refuse a corpus whose ids mean other text. Raises ValueError."""
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
