"""A run's tokenizer as one that transformers loads, proven to give the same ids."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

from mor_megatron.config.schema import DataConfig
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer

SAMPLE = [*list(topics.values())[:40], "  two  spaces\n\ttab, naïve 漢字 🙂"]
"""Real text (the Python language reference) that both tokenizers must encode alike."""


def export_tokenizer(data: DataConfig, longest: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer for an export; None if the run has none, or one of numbers only.

    Args:
        data: names the tokenizer.
        longest: tokens that the model can see.
    Raises:
        ValueError: its files are missing, or transformers cannot encode as it does.
    """
    if data.tokenizer_type in (None, "NullTokenizer"):
        return None
    original = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    path = Path(data.tokenizer_model)
    if data.tokenizer_type == "SentencePieceTokenizer":
        exported = _sentencepiece(path)
    elif data.tokenizer_type == "GPT2BPETokenizer" or path.is_file():
        exported = PreTrainedTokenizerFast(tokenizer_object=original._backend, clean_up_tokenization_spaces=False)
    else:
        exported = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if original._eod is not None:
        exported.eos_token = exported.convert_ids_to_tokens(original._eod)
    if exported.pad_token is None:
        exported.pad_token = exported.eos_token
    _require_same(original, exported, data)
    exported.model_max_length = longest
    # Where generation continues from; the model takes either. Only what is among init_kwargs is saved.
    exported.padding_side = exported.init_kwargs["padding_side"] = "left"
    return exported


def _sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)} if is_bpe else pieces
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab)
    special = {}
    for role in ("bos", "eos", "unk"):
        index = getattr(proto.trainer_spec, f"{role}_id")
        if index >= 0:
            special[f"{role}_token"] = pieces[index][0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _require_same(original: Tokenizer, exported: PreTrainedTokenizerFast, data: DataConfig) -> None:
    ours = original.tokenize_batch(SAMPLE)
    theirs = exported(SAMPLE, add_special_tokens=False)["input_ids"]
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    if differ:
        raise ValueError(
            f"tokenizer-model={data.tokenizer_model} encodes {differ} of {len(SAMPLE)} sample texts otherwise in "
            "transformers: use --no-tokenizer, and tokenize as in training"
        )
