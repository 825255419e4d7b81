"""Tokenizers of runs in transformers, and text decoded token by token."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.data.tokenizers import build_tokenizer
from mor_megatron.huggingface.tokenizer import SAMPLE, encoder_of_training, export_tokenizer, random_texts
from mor_megatron.inference.loading import StreamDecoder, encode

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
    """By default special tokens in a text are tokens, as everywhere in that library; training's sentencepiece spells
    them, and so does evaluation."""
    original = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    export_tokenizer(data, 128).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SAMPLE[:5], TEXT]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == original.tokenize(text)
        assert loaded(text)["input_ids"] == original.tokenize(text)
    end = loaded.eos_token
    texts = [f"one {end} two", f"{end}<s><|pad|><unk>", *random_texts(50, [end, "<s>", "<|pad|>"])]
    assert encoder_of_training(loaded)(texts) == original.tokenize_batch(texts)
    assert original.eod in loaded(texts[0])["input_ids"]
    spelled = loaded(texts[0], split_special_tokens=True)["input_ids"]
    assert original.eod not in spelled
    if data.tokenizer_type == "SentencePieceTokenizer":
        assert spelled == original.tokenize(texts[0])
    assert loaded.model_max_length == 128
    assert loaded.padding_side == "left"


def test_special_tokens_are_those_of_training(data: DataConfig):
    """Before a document stands the end of another; padding is neither, so that a collator leaves ends in the labels."""
    exported = export_tokenizer(data, 128)
    eod = build_tokenizer(data.tokenizer_type, data.tokenizer_model).eod
    assert exported.bos_token_id == exported.eos_token_id == eod
    assert exported.pad_token_id == 600  # behind the vocabulary
    texts = [f"short{exported.eos_token}", f"a longer text{exported.eos_token}"]
    batch = DataCollatorForLanguageModeling(exported, mlm=False)([exported(text) for text in texts])
    assert batch["labels"][:, -1].tolist() == [eod, eod]
    assert batch["labels"][0, 0] == -100
    without = export_tokenizer(data, 128, own_padding=False)
    assert (without.pad_token, len(without)) == (None, 600)


def test_a_tokenizer_of_transformers_keeps_what_training_used(data: DataConfig, tmp_path: Path):
    """Its padding, chat template and tokens, but not the one it puts before a text, which training left out."""
    theirs = export_tokenizer(data, 128, own_padding=False)
    theirs.add_special_tokens({"bos_token": "<begin>", "pad_token": "<none>", "extra_special_tokens": ["<user>"]})
    begin = [("<begin>", theirs.bos_token_id)]
    theirs.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=begin)
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] == theirs.bos_token_id
    exported = export_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)), 128)
    assert exported("a")["input_ids"] == build_tokenizer("HuggingFaceTokenizer", str(tmp_path)).tokenize("a")
    assert (exported.bos_token, exported.pad_token, exported.chat_template) == (
        exported.eos_token,
        "<none>",
        theirs.chat_template,
    )
    assert exported("<user>")["input_ids"] == [theirs.convert_tokens_to_ids("<user>")]
    assert len(exported) == len(theirs)


def test_pieces_make_up_the_text(data: DataConfig):
    tokenizer = export_tokenizer(data, 128)
    ids = encode(TEXT, tokenizer, 600)
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.next(token) for token in ids]
    assert "".join(shown) == TEXT
    assert len(shown) > shown.count("") > 0  # characters of several tokens


def test_numbers_are_text_without_a_tokenizer():
    assert export_tokenizer(DataConfig(tokenizer_type="NullTokenizer", tokenizer_model="9"), 8) is None
    assert encode("3 1 4", None, 10) == [3, 1, 4]
    for text in ("3 x", "3 10", ""):
        with pytest.raises(ValueError, match=r"is not an id|is empty"):
            encode(text, None, 10)


def test_another_encoding_is_refused_in_exports_only(tmp_path: Path):
    """sentencepiece's own default normalisation: equal on English, but transformers drops combining marks with it. What
    is not exported is not converted."""
    prefix = str(tmp_path / "nfkc")
    lines = [line for text in SAMPLE[:10] for line in text.splitlines() if line]
    options = {"model_prefix": prefix, "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), **options)
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=f"{prefix}.model")
    with pytest.raises(ValueError, match=r"nfkc.model encodes \d+ of 1041 .*--no-tokenizer"):
        export_tokenizer(data, 128)
    original, itself = (
        build_tokenizer(data.tokenizer_type, data.tokenizer_model),
        export_tokenizer(data, 128, convert=False),
    )
    assert (itself.eos_token_id, itself.pad_token_id, itself.model_max_length) == (original.eod, 400, 128)
    assert itself.decode([300, 5000, 301]) == itself.decode([300, 301])  # a model's vocabulary may be larger
    texts = [*SAMPLE[:9], TEXT, *random_texts(100, itself.all_special_tokens)]
    wanted = original.tokenize_batch(texts)
    assert encoder_of_training(itself)(texts) == wanted
    assert encode(TEXT, itself, 400) == original.tokenize(TEXT)
    assert original.eod in encode(f"one {itself.eos_token} two", itself, 400)
    for ids in wanted:
        before, decoder = StreamDecoder(itself), StreamDecoder(itself, ids[:5])
        first = "".join(before.next(token) for token in ids[:5])
        if not before.rest():  # it is no part of a character that is cut
            assert first + "".join(decoder.next(token) for token in ids[5:]) == original.detokenize(ids)
