"""Tokenizers that give a text other ids have other fingerprints; corpora are bound to their tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from corpora import write_jsonl
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mor_megatron.config.schema import Config, DataConfig
from mor_megatron.data.datasets import build_datasets
from mor_megatron.data.fingerprint import Fingerprint, fingerprint, read_fingerprint
from mor_megatron.data.indexed import merge
from mor_megatron.data.preprocess import preprocess
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer


def exchange_last(items: list) -> None:
    items[-1], items[-2] = items[-2], items[-1]


SENTENCEPIECE = {
    "vocabulary": lambda model: setattr(model.pieces[-1], "piece", "ungeheuer"),
    "scores": lambda model: setattr(model.pieces[-1], "score", -1e6),
    "normalisation": lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True),
    "end-of-document": lambda model: setattr(model.trainer_spec, "eos_piece", "<s>"),
}
HUGGING_FACE = {
    "merges": lambda settings: exchange_last(settings["model"]["merges"]),
    "normalisation": lambda settings: settings.update(normalizer={"type": "NFKC"}),
    "added-tokens": lambda settings: settings["added_tokens"][0].update(lstrip=True),
}


@pytest.fixture(scope="module")
def other_model(sentencepiece_model: str, tmp_path_factory) -> str:
    """As many tokens, two of which have changed places."""
    model = ModelProto.FromString(Path(sentencepiece_model).read_bytes())
    model.pieces[-1].piece, model.pieces[-2].piece = model.pieces[-2].piece, model.pieces[-1].piece
    path = tmp_path_factory.mktemp("other") / "other.model"
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_a_copy_is_the_same_tokenizer(sentencepiece_model: str, tokenizer, tmp_path: Path) -> None:
    copy = shutil.copy(sentencepiece_model, tmp_path / "copy.model")
    os.utime(copy, (0, 0))
    made_with = fingerprint(build_tokenizer("SentencePieceTokenizer", str(copy)))
    assert made_with.difference(fingerprint(tokenizer)) is None
    assert Fingerprint.parse(made_with.to_json()) == made_with
    assert made_with.behaviour["algorithm"] == "sentencepiece bpe"


@pytest.mark.parametrize("field", SENTENCEPIECE)
def test_another_sentencepiece_model(field: str, sentencepiece_model: str, tokenizer, tmp_path: Path) -> None:
    model = ModelProto.FromString(Path(sentencepiece_model).read_bytes())
    SENTENCEPIECE[field](model)
    (tmp_path / "m.model").write_bytes(model.SerializeToString())
    other = fingerprint(build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m.model")))
    assert fingerprint(tokenizer).difference(other)[0] == field


def test_another_huggingface_tokenizer(jsonl: str, tmp_path: Path) -> None:
    folder = Path(train_tokenizer([jsonl], 600, "hf-bpe", str(tmp_path / "hf")))
    original = fingerprint(build_tokenizer("HuggingFaceTokenizer", str(folder)))
    alone = shutil.copy(folder / "tokenizer.json", tmp_path / "alone.json")
    assert original.difference(fingerprint(build_tokenizer("HuggingFaceTokenizer", str(alone)))) is None
    for field, change in HUGGING_FACE.items():
        settings = json.loads((folder / "tokenizer.json").read_text())
        change(settings)
        (tmp_path / "changed.json").write_text(json.dumps(settings))
        other = fingerprint(build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "changed.json")))
        assert original.difference(other)[0] == field


def read(prefixes: list[str], cache: Path, tokenizer=None) -> None:
    config = Config(data=DataConfig(data_path=tuple(prefixes), seq_length=32, data_cache_path=str(cache)))
    build_datasets(config, tokenizer, (1, 0, 0))


def test_a_corpus_is_read_with_its_tokenizer_only(corpus, texts, tokenizer, other_model, tmp_path, caplog) -> None:
    other = build_tokenizer("SentencePieceTokenizer", other_model)
    assert other.vocab_size == tokenizer.vocab_size
    source = write_jsonl(tmp_path / "t.jsonl", texts[:3])
    (foreign,) = preprocess([source], str(tmp_path / "foreign"), other, progress=False).prefixes
    message = r"foreign_text_document was made with another tokenizer, .*other.model, than that of .*bpe.model"
    with pytest.raises(ValueError, match=message + r" \(vocabulary=\w+, and vocabulary=\w+\): preprocess it again"):
        read([corpus, foreign], tmp_path, tokenizer)
    with pytest.raises(ValueError, match=message):
        read([corpus, foreign], tmp_path)
    with pytest.raises(ValueError, match=message):
        merge([corpus, foreign], str(tmp_path / "merged"))
    merge([corpus, corpus], str(tmp_path / "merged"))
    assert read_fingerprint(str(tmp_path / "merged")) == read_fingerprint(corpus) == fingerprint(tokenizer)

    assert not caplog.messages
    Path(f"{foreign}.tokenizer.json").unlink()  # as from an older version, or from Megatron-LM
    read([corpus, foreign], tmp_path, tokenizer)
    assert "foreign_text_document is unknown" in caplog.messages[-1]
    merge([corpus, foreign], str(tmp_path / "merged"))
    assert read_fingerprint(str(tmp_path / "merged")) is None, "nobody knows"
    Path(f"{foreign}.tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"foreign_text_document.tokenizer.json cannot be read .*delete it"):
        read([foreign], tmp_path, tokenizer)
