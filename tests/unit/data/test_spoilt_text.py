"""Corrupted JSON lines, also compressed: every valid record is read, every other one is named, none is lost."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from spoil import COUNTS, spoil

from mor_megatron.data.planning import plan
from mor_megatron.data.sources import Broken, Document, describe, read


def records(chance: random.Random) -> list[bytes]:
    """Lines as corpora have them."""
    alphabet = 'abc \t\u00e9\u4e2d\U0001f600"\\/\n{}[]:,'
    texts = [
        "".join(chance.choices(alphabet, k=chance.choice([0, 1, 20, 300]))) for _ in range(chance.randrange(2, 12))
    ]
    return [
        json.dumps({"text": text, "meta": {"n": number}}, ensure_ascii=chance.random() < 0.5).encode() + b"\n"
        for number, text in enumerate(texts)
    ]


def sound(line: bytes, first: bool) -> str | None:
    """What a line holds by its own account, read independently of the reader; None if nothing."""
    try:
        text = json.loads(line.decode("utf-8-sig" if first else "utf-8"))["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def check(path: Path, content: bytes, slices: int) -> str:
    """Read a file whose decompressed content is known, in slices, and compare."""
    lines = enumerate(content.split(b"\n"), 1)
    expected = [(number, sound(line, number == 1)) for number, line in lines if line.strip()]
    items = [item for part in plan([str(path)], workers=slices) for item in read(part)]
    broken = [item for item in items if isinstance(item, Broken)]
    places = iter(describe(broken))
    found = [item.texts[0] if isinstance(item, Document) else next(places) for item in items]
    assert len(found) == len(expected), "a record was lost or made up"
    for got, (number, text) in zip(found, expected, strict=True):
        if text is None:
            assert got.startswith(f"{path}:{number}: "), f"line {number} is broken, and reported is {got!r}"
            assert "\n" not in got
        else:
            assert got == text, f"line {number}"
    return "broken" if broken else "sound"


@pytest.mark.parametrize("count", COUNTS)
def test_spoilt_json_lines(tmp_path, count, monkeypatch):
    monkeypatch.setattr("mor_megatron.data.planning._SMALLEST_SLICE", 64)  # small files are cut, too
    chance = random.Random(6)
    outcomes = []
    for number in range(count):
        content = b"".join(records(chance))
        for _ in range(chance.choice([1, 1, 3])):
            content = spoil(content, chance)
        path = tmp_path / "text.jsonl"
        path.write_bytes(content)
        try:
            outcomes.append(check(path, content, chance.choice([1, 3])))
        except Exception as error:
            pytest.fail(f"case {number}: {type(error).__name__}: {error}\n{content!r}")
    assert outcomes.count("broken") > 0.5 * count
    assert outcomes.count("sound") > 0.02 * count


@pytest.mark.parametrize("count", COUNTS)
def test_spoilt_compressed_files(tmp_path, count):
    """gzip has a checksum: the same documents, or one error that names the file."""
    chance = random.Random(7)
    refused = 0
    for number in range(count):
        content = b"".join(records(chance))
        path = tmp_path / "text.jsonl.gz"
        path.write_bytes(spoil(gzip.compress(content, mtime=0), chance))
        refusal = None
        try:
            assert check(path, content, 1) == "sound", f"case {number}: changed text was accepted"
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(path) in refusal, f"case {number}: {refusal}"
            assert "\n" not in refusal
            refused += 1
    assert refused > 0.5 * count
