"""examples/science/compare.py: whose document a sequence is, and how wide an interval becomes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mor_megatron.evaluation.sequences import text_pieces

EOD = 9
DOCUMENTS = ([1, 2, 3, EOD], [4, EOD], [5, 6, 7, 8, 1, EOD], [2, EOD])


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "science" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(tmp_path) -> Path:
    builder = IndexedDatasetBuilder(str(tmp_path / "held_out.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "held_out.idx"))
    return tmp_path / "held_out"


def test_pieces_of_a_corpus_are_those_of_its_text(compare, corpus, tmp_path):
    lines = [json.dumps({"text": " ".join(map(str, document[:-1]))}) + "\n" for document in DOCUMENTS]
    (tmp_path / "held_out.jsonl").write_text("".join(lines))
    expected = text_pieces([str(tmp_path / "held_out.jsonl")], None, 10, 4, 100, eod=EOD)
    pieces = compare.corpus_pieces(corpus, 4)
    assert len(pieces) == len(expected) == 4
    for piece, other in zip(pieces, expected, strict=True):
        assert torch.equal(piece.tokens, other.tokens)
        assert torch.equal(piece.labels, other.labels)


def test_sequences_are_summed_by_the_document_that_they_begin_in(compare, corpus, tmp_path):
    # Predictions 1 2 3 . | 4 . 5 6 | 7 8 1 . | 2 .: the documents 0, 1, 2 and 3.
    facts = {"seq_length": 4, "sequences": 4, "tokens": 14, "ways": {"topk": {"losses": [9.0] * 4}}}
    facts["ways"]["threshold"] = {"losses": [1.0, 2.0, 3.0, 4.0]}
    (tmp_path / "a.json").write_text(json.dumps(facts))
    sums, predictions = compare.by_document([tmp_path / "a.json"], corpus)
    assert sums.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert predictions.tolist() == [4, 4, 4, 2]
    assert compare.documents_of(corpus, 7, 2).tolist() == [0, 0, 1, 2, 2, 2, 3]


def test_the_interval_has_the_variance_of_documents_and_of_seeds(compare):
    random = np.random.default_rng(1)
    predictions = np.full(400, 10.0)
    of_documents, of_seeds = random.normal(0, 5.0, 400), np.array([[-2.0], [2.0]])
    one, many = (seeds + of_documents[None] for seeds in (np.zeros((2, 1)), of_seeds))
    mean, low, high = compare.interval(one, predictions, 2000)
    assert mean == pytest.approx(of_documents.mean() / 10)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    _, low, high = compare.interval(many, predictions, 2000)
    assert high - low > 0.4, "both runs of a seed may be the same one"
