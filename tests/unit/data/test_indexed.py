"""Finished corpora: every kind of damage is found and located, merging loses nothing, the tools report and exit."""

from __future__ import annotations

import runpy
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import both_files, write_jsonl

from mor_megatron.data.indexed import merge, prefixes_in, read_index, verify
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizers import build_tokenizer

TOOLS = Path(__file__).parents[3] / "tools"
HEADER = 34


@pytest.fixture
def copy(corpus: str, tmp_path: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"copy{suffix}")
    return str(tmp_path / "copy")


def patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def shorten(path: str, nbytes: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(stream.seek(0, 2) - nbytes)


def test_sound_corpus_verifies(corpus: str, tokenizer) -> None:
    assert list(verify(corpus, tokenizer.vocab_size)) == []


def count(prefix: str) -> int:
    return len(read_index(prefix).lengths)


DAMAGE = {
    "bin cut": (lambda p: shorten(p + ".bin", 6), r"copy\.bin ends at byte \d+, but according to .*copy\.idx"),
    "bin grown": (lambda p: patch(p + ".bin", Path(p + ".bin").stat().st_size, b"xx"), r"copy\.bin ends at byte"),
    "bin missing": (lambda p: Path(p + ".bin").unlink(), r"copy\.bin does not exist"),
    "idx missing": (lambda p: Path(p + ".idx").unlink(), r"copy\.idx does not exist"),
    "idx cut": (lambda p: shorten(p + ".idx", 8), r"copy\.idx has \d+ bytes, but \d+ sequences"),
    "idx header cut": (lambda p: shorten(p + ".idx", Path(p + ".idx").stat().st_size - 20), "ends at byte 20"),
    "magic": (lambda p: patch(p + ".idx", 0, b"X"), "at byte 0"),
    "version": (lambda p: patch(p + ".idx", 9, b"\2"), "version 2 at byte 9"),
    "dtype": (lambda p: patch(p + ".idx", 17, b"\x63"), "dtype code 99 at byte 17"),
    "float dtype": (lambda p: patch(p + ".idx", 17, b"\7"), "dtype code 7 at byte 17"),
    "length": (lambda p: patch(p + ".idx", HEADER + 4, struct.pack("<i", -5)), f"sequence 1 .* at byte {HEADER + 4}"),
    "pointer": (
        lambda p: patch(p + ".idx", HEADER + 4 * count(p) + 8 * 3, struct.pack("<q", 2)),
        r"sequence 3 points to byte 2 .*at byte \d+",
    ),
    "bound": (
        lambda p: patch(p + ".idx", HEADER + 12 * count(p) + 8 * 2, struct.pack("<q", 10**6)),
        "document bounds must rise .* bound 3 at byte",
    ),
    "id": (lambda p: patch(p + ".bin", 2 * 7, struct.pack("<H", 60000)), "1 of .* the first is 60000 at byte 14 "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_and_locates(damage: str, copy: str, tokenizer) -> None:
    inflict, message = DAMAGE[damage]
    inflict(copy)
    with pytest.raises(ValueError, match=message):
        raise ValueError(" ".join(verify(copy, tokenizer.vocab_size)))


def test_merge_keeps_order_and_documents(texts, tokenizer, corpus: str, tmp_path: Path) -> None:
    halves = [write_jsonl(tmp_path / "a.jsonl", texts[:20]), write_jsonl(tmp_path / "b.jsonl", texts[20:])]
    for name, half in zip("ab", halves, strict=True):
        preprocess([half], str(tmp_path / "parts" / name), tokenizer, append_eod=True, progress=False)
    prefixes = prefixes_in(str(tmp_path / "parts"))
    assert [Path(p).name for p in prefixes] == ["a_text_document", "b_text_document"]
    merge(prefixes, str(tmp_path / "merged"))
    assert both_files(str(tmp_path / "merged")) == both_files(corpus)


def test_merge_refuses(corpus: str, copy: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "ids.jsonl", ["1"])
    wide = preprocess([source], str(tmp_path / "w"), build_tokenizer("NullTokenizer", "99999"), progress=False)
    with pytest.raises(ValueError, match=r"has dtype int32 and .* uint16"):
        merge([corpus, wide.prefixes[0]], str(tmp_path / "m"))
    with pytest.raises(ValueError, match="also an input"):
        merge([corpus, copy], copy)
    with pytest.raises(ValueError, match="names no corpus"):
        merge([], str(tmp_path / "m"))
    Path(f"{copy}.idx").unlink()
    with pytest.raises(ValueError, match=r"copy\.idx is missing"):
        prefixes_in(str(tmp_path))
    assert not list(tmp_path.glob("m*"))


def tool(monkeypatch, capsys, name: str, *args) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a tool."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    return exit_.value.code, *capsys.readouterr()


def test_tools_from_text_to_inspection(jsonl: str, texts, tmp_path: Path, monkeypatch, capsys) -> None:
    train = ("--input", jsonl, "--vocab-size", 600, "--model-type", "unigram", "--output-prefix", tmp_path / "t")
    code, out, _ = tool(monkeypatch, capsys, "train_tokenizer.py", *train)
    assert (code, out.split()[4:]) == (0, ["SentencePieceTokenizer", "--tokenizer-model", f"{tmp_path}/t.model"])
    kind = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "t.model")
    options = ("--input", jsonl, "--output-prefix", tmp_path / "o", "--append-eod", "--workers", 1, "--no-progress")
    code, out, _ = tool(monkeypatch, capsys, "preprocess_data.py", *options, *kind)
    assert code == 0
    assert f"{len(texts)} documents" in out
    prefix = tmp_path / "o_text_document"
    double = ("--input", prefix, prefix, "--output-prefix", tmp_path / "double")
    code, out, _ = tool(monkeypatch, capsys, "merge_data.py", *double)
    assert (code, f"{2 * len(texts)} documents" in out) == (0, True)
    shown = ("--samples", 200, "--sample-tokens", 9)
    code, out, _ = tool(monkeypatch, capsys, "inspect_data.py", prefix, "--verify", *shown, *kind)
    assert code == 0
    assert out.count("]") == len(texts), "none twice"
    assert ", the first 9: " in out
    code, out, _ = tool(monkeypatch, capsys, "inspect_data.py", prefix, "--verify", "--samples", 2, *kind)
    assert code == 0
    assert f"tokens     {read_index(str(prefix)).tokens:,}" in out
    assert repr(texts[0])[1:-1] in out, "the first sample, decoded"
    assert "ids below 600" in out


UNWRITABLE = ["--input", Path(__file__).parents[3] / "README.md", "--vocab-size", 400, "--output-prefix", "/proc/x/y"]
WORDS = ["--input", "no.txt", "--output-prefix", "o", "--tokenizer-type", "NullTokenizer", "--tokenizer-model", 9]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("inspect_data.py", ["absent"], "absent.idx does not exist"),
        ("merge_data.py", ["--input", "absent", "--output-prefix", "o"], "absent.idx does not exist"),
        ("train_tokenizer.py", ["--input", "no.txt", "--vocab-size", 400, "--output-prefix", "o"], "no.txt does not"),
        (
            "train_tokenizer.py",
            UNWRITABLE,
            "output-prefix=/proc/x/y cannot be written (No such file or directory): free",
        ),
        ("preprocess_data.py", WORDS, "no.txt does not exist"),
        ("preprocess_data.py", [*WORDS, "--shard", "4/3"], "shard=4/3 is not I/N"),
        ("merge_data.py", ["--shards", 2, "--output-prefix", "o"], "shards=2: 1/2, 2/2 of o are missing"),
    ],
)
def test_tools_fail_with_one_line(name, args, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = tool(monkeypatch, capsys, name, *args)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_prefix_without_its_key_is_completed(corpus: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {corpus}\\?"):
        read_index(corpus.removesuffix("_text_document"))


def test_verify_tool_exits_1(copy: str, monkeypatch, capsys) -> None:
    assert tool(monkeypatch, capsys, "inspect_data.py", copy, "--verify", "--vocab-size", 600)[0] == 0
    patch(f"{copy}.bin", 0, struct.pack("<H", 601))
    code, _, err = tool(monkeypatch, capsys, "inspect_data.py", copy, "--verify", "--vocab-size", 600)
    assert (code, "the first is 601 at byte 0" in err) == (1, True)


def test_index_counts(corpus: str, texts, tokenizer) -> None:
    index = read_index(corpus)
    lengths = [len(tokenizer.tokenize(text)) + 1 for text in texts]
    assert (index.documents, index.tokens, index.dtype) == (len(texts), sum(lengths), np.uint16)
