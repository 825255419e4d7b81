"""The corpus collector without a network: documents, the source on every machine, skipped sources, kept corpora."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[3] / "tools" / "collect_corpus.py"
spec = importlib.util.spec_from_file_location("collect_corpus", SCRIPT)
collect_corpus = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = collect_corpus  # dataclasses look their module up
spec.loader.exec_module(collect_corpus)


@given(text=st.text(st.sampled_from("ab. \n"), max_size=400), size=st.integers(1, 60))
@settings(deadline=None, derandomize=True)
def test_documents_keep_every_word_in_order(text, size):
    pieces = collect_corpus.documents(text, size)
    assert " ".join(pieces).split() == text.split()
    assert all(pieces)


def test_documents_are_of_about_the_size_asked_for():
    text = "\n\n".join(f"Paragraph {i}. " + "A sentence of it. " * 5 for i in range(200))
    pieces = collect_corpus.documents(text, 1000)
    assert all(1000 <= len(piece) < 1200 for piece in pieces[:-1])
    long_paragraph = " ".join(f"Sentence {i}." for i in range(1000))
    assert all(len(piece) < 1100 for piece in collect_corpus.documents(long_paragraph, 1000))


def test_cpython_brings_english_prose_in_a_fixed_order():
    texts, again = (list(itertools.islice(collect_corpus.cpython(), 120)) for _ in range(2))
    assert texts == again
    assert sum(map(len, texts)) > 500_000
    words = " ".join(texts).split()
    assert sum(word == "the" for word in words) > 0.02 * len(words)


def test_an_unavailable_source_is_skipped_with_a_notice_and_the_corpus_is_kept(tmp_path, capsys):
    def broken():
        raise collect_corpus.SourceUnavailable("no network")
        yield

    sources = (
        collect_corpus.Source("far", "CC0", broken),
        collect_corpus.Source("near", "CC0", lambda: iter(["One.", "Two."])),
    )
    path = collect_corpus.collect(tmp_path, sources)
    assert sorted(json.loads(line)["text"] for line in path.read_text().splitlines()) == ["One.", "Two."]
    output = capsys.readouterr().out
    assert "far" in output
    assert "skipped: no network" in output
    before = path.read_bytes()
    collect_corpus.collect(tmp_path, sources[:1])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_no_source_at_all_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="add the source cpython"):
        collect_corpus.collect(tmp_path, ())


def test_a_client_that_fails_makes_its_source_unavailable():
    command = [sys.executable, "-c", "import sys; sys.exit('no such package')"]
    with pytest.raises(collect_corpus.SourceUnavailable, match="no such package"):
        list(collect_corpus._download(command, "txt"))


def test_texts_come_out_of_an_archive_sorted(tmp_path):
    pack = "import tarfile; t = tarfile.open('a.tgz', 'w:gz'); [t.add(p, 'data/' + p[-5:]) for p in {!r}]; t.close()"
    paths = [str(tmp_path / name) for name in ("b.txt", "a.txt", "c.bin")]
    for path in paths:
        Path(path).write_text(f"text of {path[-5:]}\r\n", newline="")
    texts = list(collect_corpus._download([sys.executable, "-c", pack.format(paths)], r"\.txt$"))
    assert texts == ["text of a.txt\n", "text of b.txt\n"]
