"""Tokenizers of runs in transformers, and text that comes token by token."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from transformers import AutoTokenizer

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer
from mor_megatron.huggingface.tokenizer import SAMPLE, export_tokenizer
from mor_megatron.inference.loading import Pieces, encode

TEXT = "def f(x):\n\treturn  x  # naïve 漢字 🙂\n"
KINDS = {"bpe": "SentencePieceTokenizer", "hf-bpe": "HuggingFaceTokenizer"}


@pytest.fixture(scope="module", params=KINDS)
def data(request, tmp_path_factory) -> DataConfig:
    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": text}) for text in list(topics.values())[:30]]
    (directory / "text.jsonl").write_text("\n".join(lines))
    model = train_tokenizer([str(directory / "text.jsonl")], 600, request.param, str(directory / "model"))
    return DataConfig(tokenizer_type=KINDS[request.param], tokenizer_model=model)


def test_ids_are_the_same_after_saving_and_loading(data: DataConfig, tmp_path: Path):
    original = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    export_tokenizer(data, 128).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SAMPLE[:5], TEXT]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == original.tokenize(text)
    assert loaded.eos_token_id == original.eod
    assert loaded.model_max_length == 128
    assert loaded.padding_side == "left"


def test_pieces_make_up_the_text(data: DataConfig):
    tokenizer = export_tokenizer(data, 128)
    ids = encode(TEXT, tokenizer, 600)
    pieces = Pieces(tokenizer)
    shown = [pieces.next(token) for token in ids]
    assert "".join(shown) == TEXT
    assert len(shown) > shown.count("") > 0  # characters of several tokens


def test_numbers_are_text_without_a_tokenizer():
    assert export_tokenizer(DataConfig(tokenizer_type="NullTokenizer", tokenizer_model="9"), 8) is None
    assert encode("3 1 4", None, 10) == [3, 1, 4]
    for text in ("3 x", "3 10", ""):
        with pytest.raises(ValueError, match=r"is no id|is empty"):
            encode(text, None, 10)


def test_another_encoding_is_refused(data: DataConfig, monkeypatch):
    from mor_megatron.huggingface import tokenizer

    monkeypatch.setattr(tokenizer, "SAMPLE", ["import"])
    original = tokenizer.build_tokenizer

    def other(*names):
        built = original(*names)
        monkeypatch.setattr(built, "tokenize_batch", lambda texts: [[0] for _ in texts])
        return built

    monkeypatch.setattr(tokenizer, "build_tokenizer", other)
    with pytest.raises(ValueError, match="--no-tokenizer"):
        tokenizer.export_tokenizer(data, 128)
