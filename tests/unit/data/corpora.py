"""Writes the same documents in every format the preprocessor reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import zstandard


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return str(path)


def both_files(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def write_parquet(path: Path, texts: list[str]) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=9)
    return str(path)


def write_dataset(path: Path, texts: list[str]) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))
    return str(path)


def write_compressed(path: Path, texts: list[str]) -> str:
    raw = Path(write_jsonl(path.with_name("raw.jsonl"), texts)).read_bytes()
    compress = gzip.compress if path.suffix == ".gz" else zstandard.compress
    # Two streams, as `cat a.gz b.gz` makes them.
    path.write_bytes(compress(raw[:1000]) + compress(raw[1000:]))
    return str(path)


def write_files(path: Path, texts: list[str]) -> list[str]:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_bytes(text.encode())
    return [str(p) for p in sorted(path.iterdir())]


SOURCES = {
    "gzip": lambda path, texts: [write_compressed(path / "c.jsonl.gz", texts)],
    "zstd": lambda path, texts: [write_compressed(path / "c.jsonl.zst", texts)],
    "parquet": lambda path, texts: [write_parquet(path / "c.parquet", texts)],
    "dataset": lambda path, texts: [write_dataset(path / "dataset", texts)],
    "text": lambda path, texts: write_files(path / "text", texts),
    "two files": lambda path, texts: [
        write_jsonl(path / "b.json", texts[:9]),
        write_parquet(path / "a.parquet", texts[9:]),
    ],
}
