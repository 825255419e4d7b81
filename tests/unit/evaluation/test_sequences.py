"""Text as pieces in which every token is predicted once, and the bytes that tokens stand for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.evaluation.sequences import IGNORED, pad, text_pieces, token_bytes
from mor_megatron.huggingface.tokenizer import SAMPLE, export_tokenizer

TYPES = {"hf-bpe": "HuggingFaceTokenizer", "bpe": "SentencePieceTokenizer", "unigram": "SentencePieceTokenizer"}
TEXTS = ["The import statement.\n", "naïve 漢字 🙂, twice: 🙂", "  two  spaces\n\ttab"]


@pytest.fixture(scope="module", params=[*TYPES, "bpe-itself"])
def tokenizer(request, tmp_path_factory):
    """Of an export; and a SentencePiece model itself, as of a checkpoint."""
    kind, itself = request.param.removesuffix("-itself"), request.param.endswith("-itself")
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("\n".join(SAMPLE[:10]))
    model = train_tokenizer([str(directory / "text.txt")], 400, kind, str(directory / "tok"))
    return export_tokenizer(DataConfig(tokenizer_type=TYPES[kind], tokenizer_model=model), 4096, convert=not itself)


def test_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer):
    """Also where characters are split over tokens, and from any token on."""
    counts = token_bytes(tokenizer, len(tokenizer) + 10)
    assert counts.shape == (len(tokenizer) + 10,)
    assert counts[tokenizer.eos_token_id] == 0
    assert counts[-10:].sum() == 0
    for text in SAMPLE + TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert counts[ids].sum().item() == len(text.encode())
    emoji = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 1, "no character is split"
    assert counts[emoji[1:]].sum() == 4 - counts[emoji[0]]


def test_bytes_of_a_token_that_begins_within_a_character():
    """As byte-level vocabularies have them for scripts whose characters often follow each other; and U+FFFD itself."""
    first, (a, b, c) = "æ¼", ("¢å", "Ń", "Ĺ")  # the bytes of 漢字, as GPT-2 spells them
    merges = [("¢", "å"), (a, b), (a + b, c)]
    pieces = [*ByteLevel.alphabet(), *(x + y for x, y in merges)]
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(sorted(pieces))}, merges))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    counts = token_bytes(tokenizer, len(tokenizer))
    ids = tokenizer("漢字")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*first, a + b + c]
    assert counts[ids].tolist() == [1, 1, 4]
    assert counts[tokenizer("\N{REPLACEMENT CHARACTER}")["input_ids"]].sum() == 3


@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz"])
def test_every_token_is_predicted_once(tokenizer, tmp_path: Path, form: str):
    paths = [tmp_path / f"{i}.{form}" for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        content = text if form == "txt" else json.dumps({"text": text}) + "\n" + json.dumps({"text": ""})
        path.write_bytes(gzip.compress(content.encode()) if form.endswith("gz") else content.encode())
    names = list(map(str, paths))
    pieces = text_pieces(names, tokenizer, len(tokenizer), 16, 1000)
    eod = tokenizer.eos_token_id
    expected = []
    for text in TEXTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], eod]
    assert torch.cat([piece.labels for piece in pieces]).tolist() == expected
    assert torch.cat([piece.tokens for piece in pieces]).tolist() == [eod, *expected[:-1]]
    assert {len(piece.tokens) for piece in pieces[:-1]} == {16}
    first = text_pieces(names, tokenizer, len(tokenizer), 16, 2)
    assert len(first) == 2
    assert torch.equal(first[1].labels, pieces[1].labels)


def test_ids_as_text_and_padding(tmp_path: Path):
    (tmp_path / "ids.txt").write_text("5 6 7 8 9")
    pieces = text_pieces([str(tmp_path / "ids.txt")], None, 10, 3, 9)
    assert [(p.tokens.tolist(), p.labels.tolist()) for p in pieces] == [([5, 6, 7], [6, 7, 8]), ([8], [9])]
    (tmp_path / "more.txt").write_text("1 2")
    (piece,) = text_pieces([str(tmp_path / name) for name in ("more.txt", "ids.txt")], None, 10, 20, 1, eod=3)
    assert (piece.tokens.tolist(), piece.labels[-1]) == ([3, 1, 2, 3, 5, 6, 7, 8, 9], 3)
    batch = pad(pieces)
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels[1].tolist() == [9, IGNORED, IGNORED]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "5", "has no token to predict"),
        ("a.txt", "5 11", "not an id below 10"),
        ("a.jsonl", '{"text": "5 6"}\n{"words": "7"}', "a.jsonl:2: no key 'text'"),
        ("a.pdf", "5 6", "unknown format .pdf"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        text_pieces([str(tmp_path / name)], None, 10, 4, 9)
