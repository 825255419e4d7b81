"""Show the contents of an indexed corpus, and verify it. See docs/data.md."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import numpy as np

from mor_megatron.data.fingerprint import check_corpora, read_fingerprint
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from mor_megatron.data.indexed import Index


def describe(prefix: str, index: Index) -> str:
    """Counts and the distribution of document lengths."""
    ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))[index.bounds]
    lengths = np.diff(ends)
    made_with = read_fingerprint(prefix)
    known = "not known" if made_with is None else made_with.origin
    quantiles = "  ".join(f"{q}% {int(np.percentile(lengths, q)):,}" for q in (5, 25, 50, 75, 95))
    return (
        f"{prefix}\n"
        f"  dtype      {index.dtype.__name__}\n"
        f"  documents  {index.documents:,}\n"
        f"  sequences  {len(index.lengths):,}\n"
        f"  tokens     {index.tokens:,}\n"
        f"  tokenizer  {known}\n"
        f"  tokens per document: mean {lengths.mean():,.1f}  min {lengths.min():,}  max {lengths.max():,}  {quantiles}"
    )


def sample(prefix: str, index: Index, number: int, tokenizer: Tokenizer | None, shown: int) -> str:
    """The first `shown` tokens of one sequence, as text when there is a tokenizer."""
    from mor_megatron.data.indexed import read_tokens

    begin = int(index.pointers[number]) // np.dtype(index.dtype).itemsize
    ids = read_tokens(prefix, index)[begin : begin + min(shown, int(index.lengths[number]))].tolist()
    content = repr(tokenizer.detokenize(ids)) if tokenizer else " ".join(map(str, ids))
    cut = f", the first {shown}" if shown < index.lengths[number] else ""
    return f"[{number}] {index.lengths[number]} tokens{cut}: {content}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="path without .bin or .idx")
    parser.add_argument("--samples", type=int, default=0, help="number of sequences to show, spread over the corpus")
    parser.add_argument("--sample-tokens", type=int, default=100, help="tokens to show per sequence")
    parser.add_argument(
        "--tokenizer-type", help="tokenizer type, to decode samples and check ids against its vocabulary"
    )
    parser.add_argument("--tokenizer-model", help="tokenizer file or directory")
    parser.add_argument("--vocab-size", type=int, help="--verify: every id must be below this")
    parser.add_argument(
        "--verify", action="store_true", help="read the whole corpus; exit status 1 if something is wrong"
    )
    args = parser.parse_args()
    from mor_megatron.data.indexed import read_index, verify

    try:
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model) if args.tokenizer_type else None
        if args.verify:
            vocab_size = args.vocab_size or (tokenizer.vocab_size if tokenizer else None)
            problems = list(verify(args.prefix, vocab_size))
            if problems:
                print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
                return 1
        index = read_index(args.prefix)
        check_corpora([args.prefix], tokenizer)
        print(describe(args.prefix, index))
        for number in np.unique(np.linspace(0, len(index.lengths) - 1, args.samples).round().astype(int)):
            print(sample(args.prefix, index, int(number), tokenizer, args.sample_tokens))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.verify:
        print("verified: sizes, index" + (f", ids below {vocab_size}" if vocab_size else " (ids not checked)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
