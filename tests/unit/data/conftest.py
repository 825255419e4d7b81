"""A small real corpus and a tokenizer trained on it, shared by all data tests."""

from __future__ import annotations

import pydoc_data.topics

import pytest
from corpora import write_jsonl

from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of prose and code; the first ones are hard to keep unchanged."""
    hard = [
        "  two  spaces\t\ttabs \n\n",
        "é 漢字 😀 \x00 \u200b",
        "a literal </s> and <|endoftext|>x",
        "line\r\nline\n",
    ]
    return [*hard, *(text[:2000] for text in list(pydoc_data.topics.topics.values())[:60])]


@pytest.fixture(scope="session")
def jsonl(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("jsonl") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def sentencepiece_model(jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_tokenizer([jsonl], 600, "bpe", str(tmp_path_factory.mktemp("sentencepiece") / "bpe"))


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model: str) -> Tokenizer:
    return build_tokenizer("SentencePieceTokenizer", sentencepiece_model)


@pytest.fixture(scope="session")
def corpus(jsonl: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of the corpus with ends of documents; treat as read-only."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "c")
    return preprocess([jsonl], prefix, tokenizer, append_eod=True, progress=False).prefixes[0]
