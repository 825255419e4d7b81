"""Tokenizers: lossless, one end of document, errors that name the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mor_megatron.data.tokenizer_training import train_tokenizer
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
        ("GPT2BPETokenizer", ".", "wants a directory with vocab.json"),
        ("NullTokenizer", "many", "wants the number of ids"),
    ],
)
def test_wrong_model(tokenizer_type: str, model: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("plain text")
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tokenizer_type, model)


@pytest.mark.parametrize(
    ("vocab_size", "model_type", "message"),
    [(600, "wordpiece", "use one of bpe"), (100, "bpe", "too small"), (10**6, "bpe", "lower --vocab-size")],
)
def test_training_errors(vocab_size: int, model_type: str, message: str, jsonl: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer([jsonl], vocab_size, model_type, str(tmp_path / "t"))
