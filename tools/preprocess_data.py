"""Turn text into Megatron's indexed corpora: PREFIX_KEY_document.bin and .idx. See docs/data.md."""

from __future__ import annotations

import argparse
import signal
import sys

from mor_megatron.data.shards import parse_shard
from mor_megatron.data.sources import SUPPORTED
from mor_megatron.data.tokenizers import build_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=SUPPORTED)
    parser.add_argument("--output-prefix", required=True, help="output PREFIX")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields that contain text; a.b: field b of a"
    )
    parser.add_argument("--tokenizer-type", required=True, help="SentencePieceTokenizer, HuggingFaceTokenizer, ...")
    parser.add_argument("--tokenizer-model", required=True, help="tokenizer file or directory")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="stop at a broken record instead of skipping it")
    parser.add_argument("--split-paragraphs", action="store_true", help="plain text: a document per paragraph")
    parser.add_argument("--shard", metavar="I/N", help="only make shard I of N; merge_data.py joins the shards")
    parser.add_argument("--no-progress", action="store_true", help="do not show a progress bar")
    args = parser.parse_args()
    from mor_megatron.data.preprocess import default_workers, preprocess, summary

    # A terminated run must clean up like an interrupted one. Shells let background programs ignore SIGINT, so SIGINT's
    # handler cannot be reused.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = preprocess(
            args.input,
            args.output_prefix,
            build_tokenizer(args.tokenizer_type, args.tokenizer_model),
            tuple(args.json_keys),
            append_eod=args.append_eod,
            workers=default_workers() if args.workers is None else args.workers,
            strict=args.strict,
            paragraphs=args.split_paragraphs,
            progress=not args.no_progress,
            shard=None if args.shard is None else parse_shard(args.shard),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no output was left behind", file=sys.stderr)
        return 130
    print(summary(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
