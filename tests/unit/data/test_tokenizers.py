"""Tokenizers: lossless, one end of document, errors that name the remedy."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from corpora import write_jsonl

from mor_megatron.data.tokenizer_training import LONGEST_LINE, Reading, train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer

TYPES = {"bpe": "SentencePieceTokenizer", "unigram": "SentencePieceTokenizer", "hf-bpe": "HuggingFaceTokenizer"}


@pytest.mark.parametrize("model_type", TYPES)
def test_trained_tokenizer_is_lossless(model_type: str, jsonl: str, texts: list[str], tmp_path: Path) -> None:
    model = train_tokenizer([jsonl], 600, model_type, str(tmp_path / "t"))
    tokenizer = build_tokenizer(TYPES[model_type], model)
    batch = tokenizer.tokenize_batch(texts)
    assert [tokenizer.detokenize(ids) for ids in batch] == texts
    assert [tokenizer.tokenize(text) for text in texts] == batch
    assert tokenizer.vocab_size <= 600
    assert max(max(ids) for ids in batch) < tokenizer.vocab_size
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert sum(map(len, batch)) < sum(len(text.encode()) for text in texts) / 1.5, "it compresses, so it has learned"


def test_sentencepiece_text_cannot_forge_an_end_of_document(tokenizer) -> None:
    assert tokenizer.eod not in tokenizer.tokenize("a </s> b")


def test_huggingface_directory_and_file_agree(jsonl: str, texts: list[str], tmp_path: Path) -> None:
    folder = train_tokenizer([jsonl], 600, "hf-bpe", str(tmp_path / "hf"))
    directory = build_tokenizer("HuggingFaceTokenizer", folder)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "some.json").write_bytes((Path(folder) / "tokenizer.json").read_bytes())
    file = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "alone" / "some.json"))
    assert directory.tokenize_batch(texts) == file.tokenize_batch(texts)
    assert directory.eod == file.eod == directory.tokenize("<|endoftext|>")[0]


def test_truncation_of_a_tokenizer_json_is_not_applied(jsonl: str, tmp_path: Path) -> None:
    folder = Path(train_tokenizer([jsonl], 600, "hf-bpe", str(tmp_path / "hf")))
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    text = "many words stay many words " * 5
    assert build_tokenizer("HuggingFaceTokenizer", str(folder)).detokenize(
        build_tokenizer("HuggingFaceTokenizer", str(folder)).tokenize(text)
    ) == text  # fmt: skip


def test_gpt2_files(tmp_path: Path) -> None:
    import tokenizers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["the cat sat on the mat"] * 9, vocab_size=280, special_tokens=["<|endoftext|>"])
    trained.save_model(str(tmp_path))
    tokenizer = build_tokenizer("GPT2BPETokenizer", str(tmp_path))
    assert tokenizer.detokenize(tokenizer.tokenize(" the\tcat  ")) == " the\tcat  "
    assert tokenizer.tokenize("<|endoftext|>") == [tokenizer.eod]


def test_null_tokenizer() -> None:
    tokenizer = build_tokenizer("NullTokenizer", "50")
    assert tokenizer.tokenize("3 1 4") == [3, 1, 4]
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.detokenize([3, 1])) == (50, 51, "3 1")


def test_missing_end_of_document_names_the_remedy(jsonl: str, tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "no_eod.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "no_eod.json"))
    assert tokenizer.tokenize("b") == [1]
    with pytest.raises(ValueError, match=r"no_eod\.json has no end-of-document token.*leave out --append-eod"):
        _ = tokenizer.eod


@pytest.mark.parametrize(
    ("tokenizer_type", "model", "message"),
    [
        ("BertTokenizer", "x", "BertTokenizer is unknown: use one of SentencePieceTokenizer"),
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        ("SentencePieceTokenizer", "absent.model", "absent.model does not exist"),
        ("SentencePieceTokenizer", "other.txt", "is not a sentencepiece model"),
        ("HuggingFaceTokenizer", "other.txt", "is not a tokenizer.json"),
        ("HuggingFaceTokenizer", ".", "is not a Hugging Face tokenizer directory"),
        ("GPT2BPETokenizer", ".", "needs a directory with vocab.json"),
        ("NullTokenizer", "many", "needs the number of ids"),
    ],
)
def test_wrong_model(tokenizer_type: str, model: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("plain text")
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tokenizer_type, model)


@pytest.mark.parametrize(
    ("model_type", "coverage", "message"),
    [
        ("wordpiece", None, "use one of bpe"),
        ("bpe", 0.9, "character-coverage=0.9 is not between 0.98 and 1"),
        ("hf-bpe", 0.99, "character-coverage=0.99 has no effect with model-type=hf-bpe"),
    ],
)
def test_training_errors(model_type: str, coverage: float | None, message: str, jsonl: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer([jsonl], 600, model_type, str(tmp_path / "t"), character_coverage=coverage)


@pytest.mark.parametrize(
    ("vocab_size", "model_type", "advice"),
    [
        (10**6, "bpe", r"more than the text can fill: use --vocab-size (\d+) or less"),
        (10**6, "unigram", r"more than the text can fill: use --vocab-size (\d+) or less"),
        (100, "bpe", r"no room for 256 bytes.*: use --vocab-size (\d+) or more"),
        (100, "hf-bpe", r"no room for 256 bytes.*: use --vocab-size (\d+) or more"),
    ],
)
def test_advice_on_the_vocabulary_is_right(vocab_size: int, model_type: str, advice: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "few.jsonl", [f"the {i} elephants of giraffe {i * i}" for i in range(99)])
    with pytest.raises(ValueError, match=advice) as refusal:
        train_tokenizer([source], vocab_size, model_type, str(tmp_path / "t"))
    assert "--character-coverage" not in str(refusal.value), "no coverage makes room for the bytes"
    advised = int(re.search(advice, str(refusal.value))[1])
    model = train_tokenizer([source], advised, model_type, str(tmp_path / "t"))
    assert build_tokenizer(TYPES[model_type], model).vocab_size == advised


def test_less_coverage_is_advised_only_where_there_is_less(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "few.jsonl", ["the quick brown fox jumps over the lazy dog"] * 9)
    for coverage, end in (
        (0.9999, r"or more, or a --character-coverage below 0\.9999, down to 0\.98\."),
        (0.98, "or more."),
    ):
        with pytest.raises(ValueError, match=rf"use --vocab-size \d+ {end}$"):
            train_tokenizer([source], 262, "bpe", str(tmp_path / "t"), character_coverage=coverage)


def test_characters_below_the_coverage_are_spelled_in_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rare.jsonl", ["the cat sat on the mat " * 9] * 99 + ["\u6f22\u5b57"])
    for coverage, length in ((1.0, 1), (0.98, 6)):
        model = train_tokenizer([source], 285, "bpe", str(tmp_path / "t"), character_coverage=coverage)
        assert len(build_tokenizer(TYPES["bpe"], model).tokenize("\u6f22\u5b57")) == length


def pieces(*texts: str) -> tuple[list[str], list[str]]:
    """What sentencepiece is given of texts, and what is said about it."""
    reading = Reading([])
    reading.texts = lambda: iter(texts)
    return list(reading.pieces()), list(reading.report())


def test_no_line_is_too_long_or_lost() -> None:
    line = "elephant giraffe " * 2000 + "x" * 2 * LONGEST_LINE + " end"
    found, said = pieces("short", line, "two\nlines")
    assert "".join(found[1:-2]) == line
    assert max(map(len, found)) == LONGEST_LINE
    assert [piece[0] for piece in found[2:-2]] == [" ", " ", " ", "x", "x"]
    assert [found[0], *found[-2:]] == ["short", "two", "lines"]
    assert said == ["1 lines of more than 16,384 characters were split, at blanks if they have any"]


def test_what_sentencepiece_would_pass_over_is_learned_from(tmp_path: Path, caplog) -> None:
    short = [f"the quick brown fox jumps over dog {i}" for i in range(200)]
    # In one line each; and beside the character that marks sentencepiece's own unknown.
    texts = short + ["elephant giraffe " * 1000] * 50 + ["\u2585 crocodile hippopotamus"] * 50
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": ""}\n{"text": 1}\n')
    model = train_tokenizer([write_jsonl(tmp_path / "a.jsonl", texts), str(broken)], 500, "bpe", str(tmp_path / "t"))
    tokenizer = build_tokenizer(TYPES["bpe"], model)
    for word in (" elephant", " giraffe", " crocodile", " hippopotamus"):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert caplog.messages == [
        "skipped 1 empty texts",
        "skipped 1 broken records:",
        f"  {broken}:2: 'text' holds int, not text",
        "50 lines of more than 16,384 characters were split, at blanks if they have any",
    ]


@pytest.mark.parametrize("model_type", ["bpe", "hf-bpe"])
def test_a_damaged_file_is_named_and_nothing_written(model_type: str, jsonl: str, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(Path(jsonl).read_bytes())[:-9])
    with pytest.raises(ValueError, match=r"^\S+cut.jsonl.gz cannot be read \("):
        train_tokenizer([str(tmp_path / "cut.jsonl.gz")], 600, model_type, str(tmp_path / "t"))
    assert [path.name for path in tmp_path.iterdir()] == ["cut.jsonl.gz"]


def test_a_vocabulary_that_the_text_does_not_fill_is_told(tmp_path: Path, caplog) -> None:
    train_tokenizer([write_jsonl(tmp_path / "a.jsonl", ["ab" * 9])], 600, "hf-bpe", str(tmp_path / "t"))
    assert caplog.messages == ["the text fills 262 of vocab-size=600 ids"]
