"""Load a model to run, from an export or directly from a checkpoint of any layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mor_megatron.huggingface.export import DTYPES, cast, read_checkpoint, to_model
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.tokenizer import export_tokenizer


def is_export(path: str | Path) -> bool:
    """Whether a path is a transformers directory. Otherwise it can only be one of our checkpoints."""
    return (Path(path) / "config.json").exists()


def load_model(
    path: str | Path, dtype: str = "fp32", device: str | None = None
) -> tuple[MoRForCausalLM, PreTrainedTokenizerBase | None]:
    """Load a model in evaluation mode, and its tokenizer if it has one.

    The code of this package runs; code stored beside the weights does not.

    Args:
        path: an export, a run's directory, or one checkpoint in it.
        dtype: fp32, bf16 or fp16.
        device: default: CUDA if available, otherwise the CPU.
    Raises:
        ValueError: the path contains no model, or a damaged one, or its tokenizer gives other ids than in training.
    """
    path = Path(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_export(path):
        model = _read_export(path, DTYPES[dtype])
        has_tokenizer = (path / "tokenizer_config.json").exists()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path) if has_tokenizer else None
    else:
        checkpoint = read_checkpoint(path)
        data, longest = checkpoint.config.data, checkpoint.config.model.max_position_embeddings
        tokenizer = export_tokenizer(data, longest, convert=False, trained=checkpoint.is_trained)
        model = to_model(checkpoint.weights, checkpoint.config, tokenizer)
        model = cast(model, DTYPES[dtype])
    return model.to(device).eval(), tokenizer


def _read_export(path: Path, dtype: torch.dtype) -> MoRForCausalLM:
    """Load an export, and refuse what transformers accepts: missing weights, and models of another kind."""
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != MoRForCausalLM.config_class.model_type:
            raise ValueError(f"model={path} is a {kind} model: import it with tools/import_hf.py")
        model, found = MoRForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"model={path} cannot be read: {str(error).splitlines()[0]}") from error
    for fault, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        for name in sorted(found[fault]):
            raise ValueError(f"model={path} {verb} {name if isinstance(name, str) else name[0]}: export it again")
    return model


def document_start(model: MoRForCausalLM) -> list[int]:
    """The token that precedes a document in training; a text without a prompt starts from it.

    Raises:
        ValueError: the model has no such token.
    """
    token = model.generation_config.bos_token_id
    if token is None:
        raise ValueError(
            "this model has no token that begins a document, because its run had no tokenizer: give a prompt"
        )
    return [token]


def encode(text: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[int]:
    """Ids of a text. Without a tokenizer, the text consists of ids: decimal numbers separated by white space.

    Raises:
        ValueError: the text is empty, or contains something that is not an id.
    """
    if tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        words = text.split()
        wrong = [word for word in words if not word.isdecimal() or int(word) >= vocab_size]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is not an id below {vocab_size}: the model has no tokenizer, so give numbers"
            )
        ids = [int(word) for word in words]
    if not ids:
        raise ValueError("the text is empty: give at least one token")
    return ids


def continuation(prompt: Sequence[int], tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text that tokens add to a prompt. They are decoded together: some tokenizers strip a leading space."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    whole, before = tokenizer.decode([*prompt, *tokens]), tokenizer.decode(list(prompt))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(tokens))


class StreamDecoder:
    """Decodes a stream of tokens one at a time.

    If a character spans several tokens, its text belongs to the last of them.

    Args:
        tokenizer: if None, the text of a token is its number.
        before: tokens that the first one follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self._ids = list(before[-4:])  # a character has at most four tokens
        self._context = len(self._ids)
        """The first of `_ids`: some tokenizers strip a space at the beginning of a text. The others are of a character
        that is not complete."""

    def next(self, token: int) -> str:
        """The text that a token adds."""
        if self.tokenizer is None:
            return f"{token} "
        self._ids.append(token)
        piece = self._added()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return piece

    def rest(self) -> str:
        """Replacement characters for an incomplete character at the end of the text."""
        return "" if self.tokenizer is None else self._added()

    def _added(self) -> str:
        """The text of what follows the context."""
        context, all_of_it = self._ids[: self._context], self._ids
        before, text = (self.tokenizer.decode(ids, skip_special_tokens=False) for ids in (context, all_of_it))
        return text[len(before) :]
