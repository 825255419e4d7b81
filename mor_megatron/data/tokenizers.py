"""One small interface over the tokenizer libraries, under Megatron-LM's type names.

Megatron-core has its own tokenizers. They encode one text at a time and drop special tokens when they decode. A
preprocessor needs the libraries' batch calls and lossless decoding, so these wrappers call sentencepiece, tokenizers
and transformers directly. The end-of-document id is the same as Megatron-core's: the eos of the sentencepiece model or
of the Hugging Face tokenizer.

Encoding never adds special tokens (no BOS in front of each document); `--append-eod` separates documents.
Every wrapper uses one thread: the preprocessor gets its parallelism from processes.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mor_megatron.config.schema import Config, DataConfig

# The Rust library reads this at its first batch call. Without it, every worker process would start a thread per core.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Names of the end of document in published tokenizers, used if the library does not identify it.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOD>", "<|eod|>")

TRAINED_SIZE = "trained_vocab_size"
"""Key under which an exported tokenizer records the number of ids in training."""

# Files of a tokenizer's directory. The model's config.json also determines the class that reads it.
_DIRECTORY_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("*.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, including added tokens; every id is in [0, vocab_size).
        origin: `--tokenizer-model`, as it was given.
        files: all files of the tokenizer; copied elsewhere, they make the same tokenizer.
        eod: id of the end-of-document token. Raises ValueError if the tokenizer has none.
    """

    vocab_size: int
    origin: str
    files: tuple[Path, ...]

    @property
    def eod(self) -> int: ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts: the same as `tokenize` on each, but faster."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids; special tokens of Hugging Face tokenizers appear by name."""

    def behaviour(self) -> dict[str, Any]:
        """Everything that determines the ids of a text, by name, in JSON types (see `fingerprint.py`)."""


class _Base:
    vocab_size: int
    origin: str
    files: tuple[Path, ...] = ()
    _eod: int | None

    @property
    def eod(self) -> int:
        if self._eod is None:
            raise ValueError(
                f"tokenizer-model={self.origin} has no end-of-document token: use a tokenizer with an eos token "
                "(tools/train_tokenizer.py makes one), or leave out --append-eod, --eod-mask-loss and --reset-*."
            )
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        return self.tokenize_batch([text])[0]

    def behaviour(self) -> dict[str, Any]:
        return {"vocab-size": self.vocab_size, "end-of-document": self._eod, **self._parts()}


class SentencePieceTokenizer(_Base):
    """A sentencepiece .model file; the end of document is its eos piece, or the first of EOD_NAMES that it knows."""

    def __init__(self, model: str):
        import sentencepiece

        self.origin = model
        self.files = (Path(model),)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=model)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer-model={model} is not a sentencepiece model ({error}): give a .model file, or another "
                "--tokenizer-type."
            ) from error
        self.vocab_size = self._sp.get_piece_size()
        named = (self._sp.piece_to_id(name) for name in EOD_NAMES)
        known = [i for i in named if i != self._sp.unk_id()]
        eos = self._sp.eos_id()
        self._eod = eos if eos >= 0 else (known[0] if known else None)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._sp.encode(texts, num_threads=1)

    def detokenize(self, ids: list[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def _parts(self) -> dict[str, Any]:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._sp.serialized_model_proto())
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        return {
            "algorithm": f"sentencepiece {type(trainer).ModelType.Name(trainer.model_type).lower()}",
            "vocabulary": [(piece.piece, piece.type) for piece in model.pieces],
            "scores": [piece.score for piece in model.pieces],
            "normalisation": (
                normalizer.precompiled_charsmap.hex(),
                normalizer.add_dummy_prefix,
                normalizer.remove_extra_whitespaces,
                normalizer.escape_whitespaces,
                trainer.treat_whitespace_as_suffix,
            ),
        }


class FastTokenizer(_Base):
    """A `tokenizers` (Rust) tokenizer; `eod` is given, or found among EOD_NAMES."""

    def __init__(self, backend, origin: str, files: tuple[Path, ...], eod: int | None = None):
        self.origin = origin
        self.files = files
        self._backend = backend
        # A tokenizer.json may contain truncation or padding settings; both would change the corpus.
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = _id_count(backend.get_vocab(with_added_tokens=True))
        named = (backend.token_to_id(name) for name in EOD_NAMES)
        self._eod = eod if eod is not None else next((i for i in named if i is not None), None)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: list[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _parts(self) -> dict[str, Any]:
        settings = json.loads(self._backend.to_str())
        model = settings["model"]
        if isinstance(model.get("vocab"), dict):
            del model["vocab"]  # a list has scores
        # Older versions of the library wrote a merge as one string.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", ())]
        return {
            "algorithm": model.get("type") or type(self._backend.model).__name__,
            "vocabulary": self._backend.get_vocab(with_added_tokens=True),
            "merges": [pairs, model],
            "normalisation": [settings["normalizer"], settings["pre_tokenizer"]],
            "added-tokens": settings["added_tokens"],
        }


class SlowTokenizer(_Base):
    """A transformers tokenizer without a Rust backend."""

    def __init__(self, tokenizer, origin: str, files: tuple[Path, ...]):
        self.origin = origin
        self.files = files
        self._tokenizer = tokenizer
        self.vocab_size = _id_count(tokenizer.get_vocab())
        self._eod = tokenizer.eos_token_id

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def detokenize(self, ids: list[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def _parts(self) -> dict[str, Any]:
        names = self._tokenizer.vocab_files_names.values()
        return {
            "algorithm": type(self._tokenizer).__name__,
            "vocabulary": self._tokenizer.get_vocab(),
            "files": [file.read_bytes().hex() for file in self.files if file.name in names],
        }


class NullTokenizer(_Base):
    """Text that already consists of ids: decimal numbers separated by white space (Megatron-LM's NullTokenizer).

    `tokenizer_model` is the number N of ordinary ids; the end of document is id N, so vocab_size is N + 1.
    """

    def __init__(self, size: str):
        self.origin = size
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"tokenizer-model={size!r}: NullTokenizer needs the number of ids, for example 1024.")
        self._eod = int(size)
        self.vocab_size = self._eod + 1

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def _parts(self) -> dict[str, Any]:
        return {"algorithm": "numbers"}


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None) -> Tokenizer:
    """The tokenizer of `--tokenizer-type` and `--tokenizer-model`.

    Args:
        tokenizer_type: SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer or NullTokenizer.
        tokenizer_model: a .model file; a tokenizer directory or tokenizer.json; a directory with vocab.json and
            merges.txt (or encoder.json and vocab.bpe); the number of ids. Nothing is ever downloaded.
    Raises:
        ValueError: the type is unknown, or the model is missing or of another kind.
    """
    if tokenizer_type not in _BUILDERS:
        raise ValueError(f"tokenizer-type={tokenizer_type} is unknown: use one of {', '.join(_BUILDERS)}.")
    if not tokenizer_model:
        raise ValueError(f"tokenizer-type={tokenizer_type} needs --tokenizer-model.")
    if tokenizer_type != "NullTokenizer" and not Path(tokenizer_model).exists():
        raise ValueError(
            f"tokenizer-model={tokenizer_model} does not exist: give a local file or directory (nothing is downloaded)."
        )
    return _BUILDERS[tokenizer_type](tokenizer_model)


def configured_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run; None if the settings name none. Raises the errors of `build_tokenizer`."""
    return None if data.tokenizer_type is None else build_tokenizer(data.tokenizer_type, data.tokenizer_model)


def resolve_vocabulary(config: Config, tokenizer: Tokenizer | None) -> Config:
    """The configuration with `model.vocab_size` set, before padding: `--vocab-size`, or else the tokenizer's.

    Raises:
        ValueError: neither is given, or the tokenizer has more tokens than the model.
    """
    wanted = config.model.vocab_size
    if tokenizer is None and wanted is None:
        raise ValueError("vocab-size is not set: give it, or --tokenizer-type and --tokenizer-model")
    if wanted is None:
        return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    if tokenizer is not None and tokenizer.vocab_size > wanted:
        raise ValueError(
            f"vocab-size={wanted} is smaller than the {tokenizer.vocab_size} tokens of {config.data.tokenizer_model}: "
            "raise it or leave it out"
        )
    return config


def _huggingface(model: str) -> Tokenizer:
    path = Path(model)
    if path.is_file():
        # The directory of a tokenizer.json states which token is eos; the file alone does not.
        if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists():
            return _huggingface(str(path.parent))
        return _tokenizer_json(path)
    from transformers import AutoTokenizer

    try:
        # Without this argument, transformers would ask in the terminal whether to run code of the directory.
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if (
            path / "tokenizer.json"
        ).exists():  # alone, or beside the config.json of a model that transformers does not know
            return _tokenizer_json(path / "tokenizer.json")
        said = " ".join(str(error).split())  # the library's message has several lines
        raise ValueError(
            f"tokenizer-model={model} is not a Hugging Face tokenizer directory ({said}): it needs tokenizer.json, or "
            "what AutoTokenizer reads."
        ) from error
    size = tokenizer.init_kwargs.get(TRAINED_SIZE)
    names = dict.fromkeys((*tokenizer.vocab_files_names.values(), *_DIRECTORY_FILES))
    if size is not None:
        del names["config.json"]  # of a model that transformers does not know
    found = tuple(file for name in names for file in sorted(path.glob(name)))
    if tokenizer.is_fast:
        backend = _as_trained(tokenizer.backend_tokenizer, size)
        return FastTokenizer(backend, model, found, tokenizer.eos_token_id)
    return SlowTokenizer(tokenizer, model, found)


def _as_trained(backend, size: int | None):
    """Remove the padding token that our own export added after the vocabulary of training."""
    import tokenizers

    if size is None:
        return backend
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"tokenizer-model={path} is not a tokenizer.json ({error}).") from error
    return FastTokenizer(backend, str(path), (path,))


def _gpt2(model: str) -> Tokenizer:
    import tokenizers

    folder = Path(model)
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() and (folder / merges).exists():
            backend = tokenizers.ByteLevelBPETokenizer(str(folder / vocab), str(folder / merges))._tokenizer
            if backend.token_to_id("<|endoftext|>") is not None:
                backend.add_special_tokens(["<|endoftext|>"])
            return FastTokenizer(backend, model, (folder / vocab, folder / merges))
    raise ValueError(
        f"tokenizer-model={model}: GPT2BPETokenizer needs a directory with vocab.json and merges.txt "
        "(or encoder.json and vocab.bpe)."
    )


def _id_count(vocab: dict[str, int]) -> int:
    # A vocabulary may have gaps; the embedding must cover the largest id.
    return max(vocab.values()) + 1


_BUILDERS = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": _huggingface,
    "GPT2BPETokenizer": _gpt2,
    "NullTokenizer": NullTokenizer,
}
