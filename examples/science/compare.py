"""The difference between two models' losses, with an interval over documents and seeds.

    python tools/evaluate.py --model RUN --text valid.jsonl --seq-length 512 --sequences 100000 --output RUN.json
    python examples/science/compare.py --corpus valid_text_document --baseline vanilla-*.json --model mor-*.json

Both sides are one JSON file for each seed, in the same order, all of the same text. Sequences are assigned to the
document that their first prediction belongs to. Documents and seeds are drawn again together, with replacement
(bootstrap), because neither the sequences of a document nor those of a run are independent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mor_megatron.evaluation.sequences import Piece

DRAWS = 10_000
CAUSAL = ("threshold", "routed", "full depth")
"""Modes that a difference can be taken in, the first that a model has."""


def causal_mode(facts: dict) -> dict:
    """The results of the mode in which a model generates."""
    return next(facts["ways"][mode] for mode in CAUSAL if mode in facts["ways"])


def indexed(corpus: Path):
    """An indexed corpus; an IndexedDataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # after our package, which silences its warnings

    return IndexedDataset(str(corpus))


def documents_of(corpus: Path, sequences: int, length: int) -> np.ndarray:
    """The document of each sequence, [sequences]: what `text_pieces` made of the texts that this corpus was made of."""
    documents = indexed(corpus)  # its arrays live as long as it does
    ends = np.cumsum(documents.sequence_lengths)
    return np.searchsorted(ends, np.arange(sequences) * length, side="right")


def corpus_pieces(corpus: Path, length: int) -> list[Piece]:
    """All of an indexed corpus in its order, as `text_pieces` cuts the text that it was made of."""
    documents = indexed(corpus)
    ids = np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64)
    stream = torch.from_numpy(np.concatenate([ids[-1:], ids]))  # an end of document precedes the first one
    starts = range(0, len(ids), length)
    return [Piece(stream[i : i + length][: len(ids) - i], stream[i + 1 : i + 1 + length]) for i in starts]


def by_document(files: Sequence[Path], corpus: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses [seeds, documents], and predictions [documents]."""
    facts = json.loads(files[0].read_text())
    length, count = facts["seq_length"], facts["sequences"]
    predictions = np.full(count, length)
    predictions[-1] = facts["tokens"] - length * (count - 1)
    documents = documents_of(corpus, count, length)
    losses = [causal_mode(json.loads(path.read_text()))["losses"] for path in files]
    sums = [np.bincount(documents, weights=weights) for weights in losses]
    return np.array(sums), np.bincount(documents, weights=predictions)


def interval(sums: np.ndarray, predictions: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean per prediction, and the ends of its 95% interval.

    Args:
        sums: of losses, or of differences of losses, [seeds, documents].
        predictions: of each document, [documents].
        draws: resamples.
    """
    random = np.random.default_rng(0)
    seeds, documents = sums.shape
    means = []
    for _ in range(draws):
        drawn = np.bincount(random.integers(documents, size=documents), minlength=documents)
        runs = np.bincount(random.integers(seeds, size=seeds), minlength=seeds)
        means.append(runs @ sums @ drawn / (seeds * (predictions @ drawn)))
    low, high = np.quantile(means, [0.025, 0.975])
    return sums.sum() / (seeds * predictions.sum()), low, high


def main() -> None:
    """Print loss and difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="prefix of the same text, indexed: its documents")
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, help="JSON of tools/evaluate.py, by seed")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="the other model's, in the same order")
    args = parser.parse_args()
    if len(args.baseline) != len(args.model):
        parser.error(f"{len(args.baseline)} seeds of the baseline and {len(args.model)} of the model: give as many")
    base, predictions = by_document(args.baseline, args.corpus)
    other, _ = by_document(args.model, args.corpus)
    for name, sums in (("baseline", base), ("model", other), ("difference", other - base)):
        mean, low, high = interval(sums, predictions)
        seeds = ", ".join(f"{value:+.4f}" for value in sums.sum(1) / predictions.sum())
        print(f"{name:10} {mean:+.4f}  95% {low:+.4f} .. {high:+.4f}  seeds {seeds}")


if __name__ == "__main__":
    main()
