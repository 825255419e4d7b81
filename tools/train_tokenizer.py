"""Train a lossless tokenizer with one end-of-document token. See docs/data.md."""

from __future__ import annotations

import argparse
import sys

from mor_megatron.data.sources import SUPPORTED
from mor_megatron.data.tokenizer_training import CHARACTER_COVERAGE, MODEL_TYPES, train_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=SUPPORTED)
    parser.add_argument("--vocab-size", type=int, required=True, help="number of token ids")
    parser.add_argument(
        "--model-type",
        choices=MODEL_TYPES,
        default="bpe",
        help="bpe, unigram: sentencepiece, PREFIX.model; hf-bpe: Hugging Face byte-level BPE, directory PREFIX",
    )
    parser.add_argument("--output-prefix", required=True, help="output PREFIX")
    parser.add_argument("--json-key", default="text", help="field that contains the text; a.b: field b of a")
    parser.add_argument(
        "--character-coverage",
        type=float,
        help="sentencepiece: fraction of the text, 0.98 to 1, whose characters get their own tokens (default: "
        f"{CHARACTER_COVERAGE}); rarer ones are spelled in bytes",
    )
    args = parser.parse_args()
    try:
        model = train_tokenizer(
            args.input, args.vocab_size, args.model_type, args.output_prefix, args.json_key, args.character_coverage
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        from mor_megatron.data.indexed import cannot_write  # imports torch, which --help should not wait for

        print(f"error: {cannot_write(args.output_prefix, error)}", file=sys.stderr)
        return 1
    kind = "HuggingFaceTokenizer" if args.model_type == "hf-bpe" else "SentencePieceTokenizer"
    print(f"use it with --tokenizer-type {kind} --tokenizer-model {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
