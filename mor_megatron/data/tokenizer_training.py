"""Train a tokenizer on the same sources the preprocessor reads.

Every tokenizer made here is lossless (text comes back byte for byte) and has one end-of-document token.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mor_megatron.data.sources import Document, plan, read
from mor_megatron.files import as_os_error, whole_file, write_whole

MODEL_TYPES = ("bpe", "unigram", "hf-bpe")
EOD = "<|endoftext|>"
# sentencepiece leaves longer sentences out without a word; lines of real text are shorter.
LONGEST_LINE = 16384


def train_tokenizer(
    inputs: list[str], vocab_size: int, model_type: str, output_prefix: str, json_key: str = "text"
) -> str:
    """Train a tokenizer and write it.

    Args:
        inputs: files or directories, in any format of `sources.py`.
        vocab_size: number of ids, end of document and 256 byte pieces included.
        model_type: `bpe` or `unigram` (sentencepiece, writes PREFIX.model and PREFIX.vocab) or `hf-bpe` (byte-level
            BPE, writes the directory PREFIX that AutoTokenizer loads).
        output_prefix: where to write.
        json_key: field of JSONL, parquet and dataset records.
    Returns:
        What to give as --tokenizer-model.
    Raises:
        ValueError: unknown type, no text, or a vocabulary larger than the text can fill.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model-type={model_type} is unknown: use one of {', '.join(MODEL_TYPES)}.")
    if vocab_size < 300:
        raise ValueError(f"vocab-size={vocab_size} is too small: 256 byte pieces and the special tokens come first.")
    documents = _texts(inputs, json_key)
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    if model_type == "hf-bpe":
        return _train_huggingface(documents, vocab_size, output_prefix)
    return _train_sentencepiece(documents, vocab_size, model_type, output_prefix)


def _train_sentencepiece(documents: Iterator[str], vocab_size: int, model_type: str, prefix: str) -> str:
    import sentencepiece

    model = io.BytesIO()  # the library writes files without looking whether there is room
    # The trainer works on lines; a newline is then encoded as its byte piece, one token, as in LLaMA's vocabulary.
    lines = (line for text in documents for line in text.split("\n") if 0 < len(line) <= LONGEST_LINE)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # Lossless: change no character, drop no space, add none, and spell what is unknown in bytes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=4 * LONGEST_LINE,
            input_sentence_size=4_000_000,
            shuffle_input_sentence=True,
            num_threads=min(16, os.cpu_count() or 1),
            # Ids 0, 1, 2; </s> ends a document. Megatron-LM takes the model's eos as end of document, too.
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab-size={vocab_size}: sentencepiece could not train ({error}). With little text, lower --vocab-size."
        ) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    table = [f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(pieces.get_piece_size())]
    with whole_file(f"{prefix}.vocab") as file:
        file.writelines(table)
        file.flush()  # both or none
        write_whole(f"{prefix}.model", model.getvalue())
    return f"{prefix}.model"


def _train_huggingface(documents: Iterator[str], vocab_size: int, prefix: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # All cores may work here; encoding keeps to one thread a process (see tokenizers.py).
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        backend.train_from_iterator(documents, trainer)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
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


def _texts(inputs: list[str], json_key: str) -> Iterator[str]:
    slices = plan(inputs, keys=(json_key,))
    documents = (item.texts[0] for part in slices for item in read(part) if isinstance(item, Document))
    first = next(documents, None)
    if first is None:
        raise ValueError(f"input={' '.join(inputs)} holds no document with text in {json_key!r}.")

    def chained() -> Iterator[str]:
        yield first
        yield from documents

    return chained()
