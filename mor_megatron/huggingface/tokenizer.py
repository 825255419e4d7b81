"""A run's tokenizer as one of transformers, proven to give the same ids.

What stands before a document in training is the end of the one before: it is the export's bos as well, or there is
none. Padding gets a token of its own, so that whoever masks padding does not mask ends of documents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.tokenizers import TRAINED_SIZE, FastTokenizer, Tokenizer, build_tokenizer

PAD = "<|pad|>"
"""Padding of tokenizers that have none of their own."""
SAMPLE = [*list(topics.values())[:40], "  two  spaces\n\ttab, naïve 漢字 🙂"]
"""Real text (the Python language reference)."""
SPELLS_SPECIAL = "spells_special_tokens"
"""What an exported tokenizer notes of training, too: whether the characters of a special token in a text were ordinary
text to it."""

_MARKS = "\u0301\u0308\u0327\u093c\u064b\u200d\u200b\u2060\ufe0f\u202e\U0001f3fd"
_BLOCKS = (
    (0x00, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700),
    (0x900, 0xE00), (0x1100, 0x1200), (0x1E00, 0x2070), (0x20A0, 0x2400), (0x3000, 0x3130), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xF900, 0xFB50), (0xFE00, 0x10000), (0x1D400, 0x1D800), (0x1F300, 0x1F700), (0xE0000, 0xE0080),
)  # fmt: skip
"""Marks that join what stands before them; blocks in which scripts, compatibility forms, controls and emoji lie."""


def export_tokenizer(
    data: DataConfig, longest: int, own_padding: bool = True, convert: bool = True, trained: bool = True
) -> PreTrainedTokenizerBase | None:
    """The tokenizer for an export; None if the run has none, or one of numbers only.

    Args:
        data: names the tokenizer.
        longest: tokens that the model can see.
        own_padding: give it a padding token that training did not have, unless it has one that is no end of document;
            otherwise it has none then.
        convert: make a SentencePiece model one of transformers, as an export needs it; otherwise it is used itself.
        trained: whether the model was trained here. An imported one that was not keeps the tokenizer it came with: its
            special tokens, what it puts around a text, its chat template.
    Raises:
        ValueError: its files are missing, or transformers cannot encode as it does.
    """
    if data.tokenizer_type in (None, "NullTokenizer"):
        return None
    original = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    path = Path(data.tokenizer_model)
    spells_special = data.tokenizer_type == "SentencePieceTokenizer"
    if spells_special:
        exported = _sentencepiece(path, convert)
    elif isinstance(original, FastTokenizer) and trained:
        exported = _rust(original, path)
    else:
        exported = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        for how_it_was_read in ("is_local", "local_files_only"):
            exported.init_kwargs.pop(how_it_was_read, None)  # or it would be saved as a setting
    if original._eod is not None:
        exported.eos_token = exported.convert_ids_to_tokens(original._eod)
    if trained:
        exported.bos_token = exported.eos_token
    if exported.pad_token in (None, exported.eos_token):
        exported.pad_token = None
        if own_padding:
            _add_padding(exported, original.vocab_size)
    exported.model_max_length = longest
    if not trained:
        exported.init_kwargs.setdefault(TRAINED_SIZE, original.vocab_size)
        return exported
    exported.padding_side = "left"  # where generation continues from; the model takes either
    # Only what is among init_kwargs is saved.
    exported.init_kwargs |= {"padding_side": "left", TRAINED_SIZE: original.vocab_size, SPELLS_SPECIAL: spells_special}
    difference = _difference(original, exported, data)
    if difference:
        raise ValueError(f"{difference}: export it with --no-tokenizer, and tokenize as in training")
    return exported


def encoder_of_training(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Texts to ids as preprocessing made them, also where a text spells a special token.

    Args:
        tokenizer: of an export. What was added to it since is ordinary text to the result.
    """
    if not tokenizer.is_fast:
        options = {
            "add_special_tokens": False,
            "split_special_tokens": tokenizer.init_kwargs.get(SPELLS_SPECIAL, False),
        }
        return lambda texts: tokenizer(texts, **options, verbose=False)["input_ids"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = tokenizer.init_kwargs.get(TRAINED_SIZE, len(tokenizer))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    if tokenizer.init_kwargs.get(SPELLS_SPECIAL, False):
        _spell_special(state)
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _spell_special(state: dict) -> None:
    """Let special tokens be no more than names of ids. `encode_special_tokens` does that, but for a text, or a part of
    one between two user-defined pieces, that is a special token and nothing else."""
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    model = state["model"]
    if model["type"] == "BPE":
        model["vocab"] = {f"\0{piece}" if piece in special else piece: i for piece, i in model["vocab"].items()}
        if model["unk_token"] in special:
            model["unk_token"] = f"\0{model['unk_token']}"


def random_texts(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Texts of characters from everywhere, with marks that join them, spaces, words, and special tokens spelled out."""
    draw = random.Random(seed)
    words = SAMPLE[0].split()
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 24)):
            kind = draw.random()
            if kind < 0.1:
                parts.append(draw.choice(special or words))
            elif kind < 0.3:
                parts.append(draw.choice(words))
            else:
                parts.append(chr(draw.randrange(*draw.choice(_BLOCKS))))
            parts += draw.choices((*_MARKS, " ", "  ", "\n", "\t", "\u2581"), k=draw.choice((0, 0, 0, 1, 2)))
        texts.append("".join(parts))
    return texts


class SentencePiece(SentencePieceBackend):
    """A SentencePiece model itself: not all of them can be converted, and not every version of transformers does it
    right. It needs that library's package."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, also of bytes."""
        return self.sp_model.decode(tokens)

    def _convert_id_to_token(self, index: int) -> str:
        """Nothing for an id beyond the vocabulary, which the model may have, and which the library would not take."""
        return super()._convert_id_to_token(index) if index < self.vocab_size else ""


def _sentencepiece(path: Path, convert: bool) -> PreTrainedTokenizerBase:
    proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    special = {}
    for role in ("bos", "eos", "unk"):
        index = getattr(proto.trainer_spec, f"{role}_id")
        if index >= 0:
            special[f"{role}_token"] = pieces[index][0]
    if not convert:
        return SentencePiece(vocab_file=str(path), clean_up_tokenization_spaces=False, **special)
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    else:
        vocab = _below_text(proto, pieces)
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _below_text(proto, pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Scores with which the unigram model of transformers never takes the characters `</s>` or `<0x41>` for the piece
    of that name: sentencepiece matches normal and user-defined pieces only."""
    kinds = type(proto.pieces[0])
    matched = (kinds.NORMAL, kinds.USER_DEFINED)
    lowest = min(0.0, *(piece.score for piece in proto.pieces if piece.type in matched))
    longest = max(len(piece) for piece, _ in pieces)
    below = (longest + 1) * (lowest - 1.0)
    return [
        (name, score if piece.type in matched else below)
        for (name, score), piece in zip(pieces, proto.pieces, strict=True)
    ]


def _rust(original: FastTokenizer, path: Path) -> PreTrainedTokenizerFast:
    """Its backend, without the tokens that it would put around a text: training puts none there."""
    backend = tokenizers.Tokenizer.from_str(original._backend.to_str())
    backend.post_processor = None
    directory = path.parent if path.is_file() else path
    named = {}
    if (directory / "tokenizer_config.json").exists():
        theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        extra = list(getattr(theirs, "extra_special_tokens", ()))
        named = {"chat_template": theirs.chat_template, "extra_special_tokens": extra} | theirs.special_tokens_map
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def _add_padding(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """A padding token behind the vocabulary that was trained. One with holes gets none: the library would fill them."""
    vocabulary = tokenizer.get_vocab()
    if PAD in vocabulary or len(vocabulary) == size:
        tokenizer.add_special_tokens({"pad_token": PAD})


def _difference(original: Tokenizer, exported: PreTrainedTokenizerBase, data: DataConfig) -> str | None:
    """Whether both tokenize alike: real text, and a thousand texts of everything that unicode has; None: they do."""
    special = [token for token in exported.all_special_tokens if token != exported.pad_token]
    texts = [*SAMPLE, *random_texts(1000, special)]
    ours, theirs = original.tokenize_batch(texts), encoder_of_training(exported)(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    if not differ:
        return None
    return (
        f"tokenizer-model={data.tokenizer_model} encodes {len(differ)} of {len(texts)} sample texts otherwise in "
        f"transformers, such as {min(differ, key=len)[:60]!a}"
    )
