"""The sequences on which a model is evaluated: tokens, each with the token that follows.

There are two sources. An indexed corpus is read sample by sample, as validation in training reads it, so that a
checkpoint reproduces the loss that its run reported. Raw text is packed as in training: documents follow one another,
each ends with the end-of-document token, and the stream is cut into pieces of equal length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mor_megatron.config.schema import Config
from mor_megatron.data.corpora import read_blends
from mor_megatron.data.datasets import build_datasets, make_batch
from mor_megatron.data.planning import plan
from mor_megatron.data.sources import Broken, describe, read
from mor_megatron.data.tokenizers import configured_tokenizer
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import training_config
from mor_megatron.huggingface.export import newest_checkpoint, read_run_config
from mor_megatron.huggingface.tokenizer import encoder_of_training
from mor_megatron.inference.loading import encode, is_export

IGNORED = -100
"""Label of a position at which nothing is predicted."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """One sequence."""

    tokens: Tensor
    """[n] int64"""
    labels: Tensor
    """[n] int64: the token after each; IGNORED where nothing is predicted."""


@dataclass(frozen=True)
class Padded:
    """A batch of pieces, padded on the right."""

    tokens: Tensor
    """[B, S] int64"""
    mask: Tensor
    """[B, S] int64, 0 at padding."""
    labels: Tensor
    """[B, S] int64"""


def pad(pieces: Sequence[Piece]) -> Padded:
    """Combine pieces of any lengths into one batch."""
    longest = max(len(piece.tokens) for piece in pieces)
    tokens = torch.zeros(len(pieces), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for row, piece in enumerate(pieces):
        count = len(piece.tokens)
        tokens[row, :count], labels[row, :count], mask[row, :count] = piece.tokens, piece.labels, 1
    return Padded(tokens, mask, labels)


def settings_of(path: Path, exported: MoRConfig) -> Config:
    """The settings of the data: those of the run for a checkpoint, defaults that fit the model for an export."""
    if is_export(path):
        return training_config(exported)
    return read_run_config(newest_checkpoint(path))[0]


class IndexedPieces:
    """The first samples of a corpus's validation split, in the order in which `training.evaluate` takes them.

    Args:
        config: its data section and seed determine the samples; its vocabulary size is resolved.
        count: number of samples; at most one pass over the split (a blend repeats its smaller corpora, as in training).
    Raises:
        ValueError: the corpus is missing or does not fit (see `build_datasets`), or the run keeps documents apart.
    """

    def __init__(self, config: Config, count: int):
        data = config.data
        if data.reset_attention_mask or data.reset_position_ids:
            raise ValueError(
                "reset-attention-mask and reset-position-ids keep the documents of a sequence apart, which an exported "
                "model does not: read the run's own validation losses, or set both to false"
            )
        self.data = data
        tokenizer = configured_tokenizer(data)
        self.eod = tokenizer.eod if data.eod_mask_loss else None
        validation = read_blends(data)[1]
        is_blend = validation is not None and len(validation.paths) > 1
        _, self.samples, _ = build_datasets(config, tokenizer, (0, count if is_blend else 1, 0))
        self.count = min(count, len(self.samples))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Piece:
        batch = make_batch([self.samples[index]], self.data, self.eod)
        labels = batch.labels
        if batch.loss_mask is not None:
            labels = labels.masked_fill(batch.loss_mask == 0, IGNORED)
        return Piece(batch.tokens[0], labels[0])


def text_pieces(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    length: int,
    count: int,
    eod: int | None = None,
) -> list[Piece]:
    """Raw text, cut into pieces. Every token is predicted once, including the ends of documents.

    Args:
        paths: files as `tools/preprocess_data.py` takes them; records have their text under `text`.
        tokenizer: if None, the text consists of ids.
        vocab_size: that of the model.
        length: tokens per piece; the last one may be shorter.
        count: maximum number of pieces.
        eod: id that ends a document; default: the tokenizer's eos.
    Raises:
        ValueError: a file cannot be read, a record is broken, or there is nothing to predict.
    """
    if eod is None and tokenizer is not None:
        eod = tokenizer.eos_token_id
    stream = _stream(paths, tokenizer, vocab_size, eod)
    ids = torch.tensor(list(itertools.islice(stream, count * length + 1)))
    if len(ids) < 2:
        raise ValueError(f"text={' '.join(paths)} has no token to predict: give more text")
    starts = range(0, len(ids) - 1, length)
    return [Piece(ids[i : i + length][: len(ids) - 1 - i], ids[i + 1 : i + 1 + length]) for i in starts]


def _stream(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eod: int | None
) -> Iterator[int]:
    if eod is not None:
        yield eod  # precedes the first token of the first document
    if tokenizer is not None:
        to_ids = encoder_of_training(tokenizer)
    for part in plan(list(paths)):
        for document in read(part):
            if isinstance(document, Broken):
                raise ValueError(f"{describe([document])[0]}: correct it, or remove it")
            text = document.texts[0]
            if not text.strip():
                continue
            if tokenizer is None:
                yield from encode(text, None, vocab_size)
            else:
                yield from to_ids([text])[0]
            if eod is not None:
                yield eod


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Number of UTF-8 bytes that each id represents in a text, [vocab_size] int64; 0 for special tokens.

    The bytes of a text are the sum over its tokens, so a text may be cut anywhere.
    """
    # Decoded after another token, because some tokenizers drop a leading space.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    before = len(tokenizer.decode([anchor]).encode())
    special = set(tokenizer.all_special_ids)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    ids = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    texts = tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    for i, text in zip(ids, texts, strict=True):
        counts[i], name = len(text.encode()) - before, tokenizer.convert_ids_to_tokens(i)
        if _UNKNOWN in text and _UNKNOWN not in name:  # part of a character, which cannot be decoded alone
            # Byte fallback writes <0xE2>; byte-level vocabularies have one character for each byte.
            counts[i] = 1 if name.startswith("<0x") else len(name)
    return counts
