"""Train a tokenizer on the same sources the preprocessor reads.

Every tokenizer made here is lossless (text comes back byte for byte) and has one end-of-document token.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mor_megatron.data.planning import plan
from mor_megatron.data.sources import SHOWN, Broken, Slice, describe, read, require_usable, skipped
from mor_megatron.files import as_os_error, whole_file, write_whole

logger = logging.getLogger(__name__)

MODEL_TYPES = ("bpe", "unigram", "hf-bpe")
EOD = "<|endoftext|>"
CHARACTER_COVERAGE = 0.9999
LEAST_COVERAGE = 0.98
"""sentencepiece's minimum."""
_BYTES_AND_SPECIAL = 256 + 3
# sentencepiece silently skips longer sentences, sentences beyond this number, and sentences with the character that it
# uses itself.
LONGEST_LINE = 16384
_MOST_LINES = 4_000_000
_LINE_ENDS = re.compile("[\n\u2585]")


@dataclass
class Reading:
    """The texts of an input, and counts of what was skipped or changed."""

    slices: list[Slice]
    empty: int = 0
    broken_count: int = 0
    broken: list[Broken] = field(default_factory=list)
    lines: int = 0
    cut: int = 0
    """Number of lines longer than LONGEST_LINE."""
    error: BaseException | None = None
    """The error that ended the reading early; a library may report it in other words."""

    def texts(self) -> Iterator[str]:
        """Yield all texts that are not empty, in order."""
        try:
            for item in itertools.chain.from_iterable(map(read, self.slices)):
                if isinstance(item, Broken):
                    self.broken_count += 1
                    self.broken += [item] if len(self.broken) < SHOWN else []
                elif item.texts[0]:
                    yield item.texts[0]
                else:
                    self.empty += 1
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise

    def pieces(self) -> Iterator[str]:
        """Yield the lines of the texts; long ones in pieces that start at a blank, or anywhere if there is none."""
        for line in itertools.chain.from_iterable(map(_LINE_ENDS.split, self.texts())):
            self.cut += len(line) > LONGEST_LINE
            while len(line) > LONGEST_LINE:
                blank = line.rfind(" ", 1, LONGEST_LINE + 1)
                end = blank if blank > 0 else LONGEST_LINE
                self.lines += 1
                yield line[:end]
                line = line[end:]
            if line:
                self.lines += 1
                yield line

    def report(self) -> Iterator[str]:
        """Describe what was skipped or changed, as lines of text."""
        yield from skipped(self.empty, self.broken_count, describe(self.broken))
        if self.cut:
            yield f"{self.cut:,} lines of more than {LONGEST_LINE:,} characters were split, at blanks if they have any"
        if self.lines > _MOST_LINES:
            yield f"training used {_MOST_LINES:,} of {self.lines:,} lines, drawn at random"


def train_tokenizer(
    inputs: list[str],
    vocab_size: int,
    model_type: str,
    output_prefix: str,
    json_key: str = "text",
    character_coverage: float | None = None,
) -> str:
    """Train a tokenizer and write it; skipped and changed input is counted and logged.

    Args:
        inputs: files, directories and patterns, as `inputs.py` takes them, in any format of `sources.py`.
        vocab_size: number of ids, end of document and 256 byte pieces included.
        model_type: `bpe` or `unigram` (sentencepiece, writes PREFIX.model and PREFIX.vocab) or `hf-bpe` (byte-level
            BPE, writes the directory PREFIX that AutoTokenizer loads).
        output_prefix: where to write.
        json_key: field of JSONL, parquet and dataset records.
        character_coverage: fraction of the text, 0.98 to 1, whose characters get their own tokens; rarer characters are
            spelled in bytes. sentencepiece only. None: 0.9999.
    Returns:
        The value for --tokenizer-model.
    Raises:
        ValueError: a setting is wrong, the input cannot be read or has no text, or the vocabulary is too small for the
            characters of the text or larger than the text can fill.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model-type={model_type} is unknown: use one of {', '.join(MODEL_TYPES)}.")
    if character_coverage is not None and model_type == "hf-bpe":
        raise ValueError(
            f"character-coverage={character_coverage} has no effect with model-type=hf-bpe, which consists of bytes: "
            "leave it out."
        )
    if character_coverage is not None and not LEAST_COVERAGE <= character_coverage <= 1:
        raise ValueError(
            f"character-coverage={character_coverage} is not between {LEAST_COVERAGE} and 1: use a fraction "
            f"such as {CHARACTER_COVERAGE}."
        )
    reading = Reading(plan(inputs, keys=(json_key,)))
    require_usable(reading.slices)
    if not any(True for _ in reading.texts()):
        raise ValueError(
            f"input={' '.join(inputs)} contains no document with text in {json_key!r} ({reading.empty} empty, "
            f"{reading.broken_count} broken)."
        )
    reading = Reading(reading.slices)
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    if model_type == "hf-bpe":
        model = _train_huggingface(reading, vocab_size, output_prefix)
    else:
        coverage = CHARACTER_COVERAGE if character_coverage is None else character_coverage
        model = _train_sentencepiece(reading, vocab_size, model_type, output_prefix, coverage)
    for line in reading.report():
        logger.warning(line)
    return model


def _train_sentencepiece(reading: Reading, vocab_size: int, model_type: str, prefix: str, coverage: float) -> str:
    import sentencepiece

    model = io.BytesIO()  # the library does not check for free disk space
    # The trainer works on lines; a newline is encoded as its byte piece, one token, as in LLaMA's vocabulary.
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=reading.pieces(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # Lossless: change no character, drop and add no space, and spell unknown characters in bytes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=coverage,
            max_sentence_length=4 * LONGEST_LINE,
            input_sentence_size=_MOST_LINES,
            shuffle_input_sentence=True,
            num_threads=min(16, os.cpu_count() or 1),
            # Ids 0, 1, 2; </s> ends a document. Megatron-LM also uses the model's eos as end of document.
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise reading.error or ValueError(_advice(str(error), vocab_size, coverage)) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    table = [f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(pieces.get_piece_size())]
    with whole_file(f"{prefix}.vocab") as file:
        file.writelines(table)
        file.flush()  # both files or none
        write_whole(f"{prefix}.model", model.getvalue())
    return f"{prefix}.model"


def _advice(error: str, vocab_size: int, coverage: float) -> str:
    """Translate sentencepiece's errors into remedies."""
    most, least = re.search(r"set it to a value <= (\d+)", error), re.search(r"required_chars\. \d+ vs (\d+)", error)
    if most is not None:
        return (
            f"vocab-size={vocab_size} is more than the text can fill: use --vocab-size {most[1]} or less, or more text."
        )
    if least is not None:
        # A lower coverage helps only if there is room for some characters, and it has a minimum.
        may_cover_less = coverage > LEAST_COVERAGE and vocab_size > _BYTES_AND_SPECIAL
        less = f", or a --character-coverage below {coverage}, down to {LEAST_COVERAGE}" if may_cover_less else ""
        return (
            f"vocab-size={vocab_size} has no room for 256 bytes, 3 special tokens and the characters of the text: use "
            f"--vocab-size {least[1]} or more{less}."
        )
    return f"sentencepiece cannot train with vocab-size={vocab_size} ({' '.join(error.split())})."


def _train_huggingface(reading: Reading, vocab_size: int, prefix: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"vocab-size={vocab_size} has no room for 256 bytes and {EOD}: use --vocab-size {len(alphabet) + 1} or more"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # Training may use all cores; encoding uses one thread per process (see tokenizers.py).
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        backend.train_from_iterator(reading.texts(), trainer)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
    if backend.get_vocab_size() < vocab_size:
        logger.warning("the text fills %d of vocab-size=%d ids", backend.get_vocab_size(), vocab_size)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=EOD, eos_token=EOD, clean_up_tokenization_spaces=False
    )
    with tempfile.TemporaryDirectory(prefix=f"{Path(prefix).name}.partial-", dir=Path(prefix).parent) as partial:
        with as_os_error(prefix):
            wrapped.save_pretrained(partial)
        Path(prefix).mkdir(exist_ok=True)
        for file in Path(partial).iterdir():
            file.replace(Path(prefix) / file.name)
    return prefix
