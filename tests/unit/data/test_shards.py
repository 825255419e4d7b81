"""Shards depend on the input alone, and merged they equal the corpus of one machine, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import SOURCES, both_files, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mor_megatron.data.indexed import merge, read_index
from mor_megatron.data.planning import cut, plan, survey
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.shards import parse_shard, shard_of, shard_prefix, shards_of
from mor_megatron.data.sources import read


def shards(inputs: list[str], prefix: Path, tokenizer, count: int, **options) -> list[int]:
    """Write them all, with other numbers of workers, the last one first; the documents of each."""
    options = {"append_eod": True, "progress": False, **options}
    reports = [
        preprocess(inputs, str(prefix), tokenizer, workers=1 + (i == 2), shard=(i, count), **options)
        for i in range(count, 0, -1)
    ]
    return [report.documents for report in reversed(reports)]


@pytest.mark.parametrize("source", SOURCES)
def test_merged_shards_of_every_source_are_the_corpus(source, corpus, texts, tokenizer, tmp_path: Path) -> None:
    inputs = SOURCES[source](tmp_path, texts)
    if source in ("gzip", "zstd"):
        with pytest.raises(
            ValueError, match=r"shard=1/3: compressed JSON lines .* has 1: use --shard I/1, or decompress"
        ):
            shard_of(survey(inputs), 1, 3)
        return
    prefix = tmp_path / "o"
    documents = shards(inputs, prefix, tokenizer, 3)
    assert sum(documents) == len(texts)
    assert min(documents) > 0
    merge(shards_of(f"{prefix}_text_document", 3), f"{prefix}_text_document")
    assert both_files(f"{prefix}_text_document") == both_files(corpus)


def test_a_shard_that_is_missing_is_named_and_made_alone(corpus, jsonl, tokenizer, tmp_path: Path) -> None:
    prefix = f"{tmp_path}/o_text_document"
    shards([jsonl], tmp_path / "o", tokenizer, 4)
    Path(f"{shard_prefix(prefix, (2, 4))}.idx").unlink()
    with pytest.raises(ValueError, match=r"shards=4: 2/4 of \S+ are missing: run preprocess_data.py with --shard 2/4"):
        shards_of(prefix, 4)
    preprocess([jsonl], f"{tmp_path}/o", tokenizer, append_eod=True, progress=False, shard=(2, 4))
    merge(shards_of(prefix, 4), prefix)
    assert both_files(prefix) == both_files(corpus)


def test_shards_of_another_input_are_not_joined(texts, tokenizer, tmp_path: Path) -> None:
    source, prefix = Path(write_jsonl(tmp_path / "s.jsonl", texts)), f"{tmp_path}/o_text_document"
    shards([str(source)], tmp_path / "o", tokenizer, 2)
    source.write_text(source.read_text() + "broken\n")
    again = {"append_eod": True, "progress": False, "shard": (2, 2)}
    with pytest.raises(ValueError, match="--strict"):
        preprocess([str(source)], f"{tmp_path}/o", tokenizer, **again, strict=True)
    with pytest.raises(ValueError, match=r"2/2 of \S+ are missing"):
        shards_of(prefix, 2)  # what is left of an earlier run does not stand in for one that failed
    preprocess([str(source)], f"{tmp_path}/o", tokenizer, **again)
    with pytest.raises(ValueError, match=r"shards=2: 2/2 of \S+ are from another input, .*: make all again"):
        shards_of(prefix, 2)


def test_shards_without_a_document_are_passed_over(tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text('{"text": "one"}\n' + "broken\n" * 120 + '{"text": ""}\n' * 20 + '{"text": "two"}\n')
    documents = shards([str(source)], tmp_path / "o", tokenizer, 5)
    assert documents == [1, 0, 0, 0, 1]
    prefix = f"{tmp_path}/o_text_document"
    assert merge(shards_of(prefix, 5), prefix).documents == 2
    with pytest.raises(ValueError, match="contains no sequence"):
        read_index(shard_prefix(prefix, (2, 5)))
    with pytest.raises(ValueError, match="contains no document"):
        merge([shard_prefix(prefix, (2, 5))], f"{tmp_path}/none")


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_part_of_every_input_is_in_one_shard(count: int, texts, tmp_path: Path) -> None:
    """Files of all kinds and sizes in one input, some of them empty; in order."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.txt").touch()
    inputs = [str(tmp_path / "empty.txt"), str(tmp_path / "empty.jsonl"), write_jsonl(tmp_path / "a.jsonl", texts)]
    for source in ("gzip", "parquet", "dataset", "text"):
        inputs += SOURCES[source](tmp_path, texts[:20])
    whole = survey(inputs)
    parts = [part for number in range(1, count + 1) for part in cut(shard_of(whole, number, count), 1)]
    found = [item.texts[0] for part in parts for item in read(part)]
    assert found == [item.texts[0] for part in plan(inputs) for item in read(part)]
    assert found == ["", *texts, *texts[:20] * 4]


def test_standard_input_cannot_be_cut(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard=1/2: standard input cannot be divided: give files"):
        preprocess(["-"], str(tmp_path / "o"), tokenizer, shard=(1, 2))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/4", "-1/4", "1/4/2"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match=f"shard={text} is not I/N"):
        parse_shard(text)
    assert parse_shard("3/12") == (3, 12)


def test_modes_of_a_multimodal_corpus_are_not_lost(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/m.bin", dtype=np.uint16, multimodal=True)
    builder.add_document([1, 2], [2], modes=[1])
    builder.finalize(f"{tmp_path}/m.idx")
    with pytest.raises(ValueError, match="m is multimodal and would lose its modes"):
        merge([f"{tmp_path}/m"], f"{tmp_path}/o")
