"""Concatenate indexed corpora of the same dtype. See docs/data.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="prefixes, or directories of .bin/.idx pairs")
    source.add_argument("--shards", type=int, metavar="N", help="the N shards that preprocess_data.py made of PREFIX")
    parser.add_argument("--output-prefix", required=True, help="prefix of the merged corpus")
    args = parser.parse_args()
    from mor_megatron.data.indexed import merge, prefixes_in
    from mor_megatron.data.shards import shards_of

    try:
        if args.shards is not None:
            prefixes = shards_of(args.output_prefix, args.shards)
        else:
            prefixes = [p for name in args.input for p in (prefixes_in(name) if Path(name).is_dir() else [name])]
        index = merge(prefixes, args.output_prefix)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output_prefix}: {index.documents:,} documents, {index.tokens:,} tokens from {len(prefixes)} corpora")
    return 0


if __name__ == "__main__":
    sys.exit(main())
