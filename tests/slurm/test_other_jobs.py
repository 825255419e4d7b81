"""From text to an evaluated model by the batch files alone: preprocess, pretrain_cpu, eval."""

from __future__ import annotations

import json
import sys
from pydoc_data.topics import topics

import pytest
from cluster import ROOT, SLURM
from small_runs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_preprocess_pretrain_evaluate(cluster, tmp_path):
    text, tokenizer, corpus = tmp_path / "text.jsonl", tmp_path / "tok", tmp_path / "docs"
    text.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in topics.values()))
    words = ["--vocab-size", "500", "--model-type", "bpe", "--output-prefix", str(tokenizer)]
    cluster.run(sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--input", str(text), *words)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}.model"]

    words = ["--input", str(text), "--output-prefix", str(corpus), "--append-eod", *tokenizer]
    job = cluster.sbatch(tmp_path / "preprocess", "--cpus-per-task=2", str(SLURM / "preprocess.sbatch"), *words)
    assert job.wait() == "COMPLETED", job.output
    corpus = ["--data-path", f"{corpus}_text_document"]

    words = ["--train-iters", "30", *corpus, *tokenizer, "--save", str(tmp_path / "run")]
    job = cluster.sbatch(tmp_path / "pretrain", str(SLURM / "pretrain_cpu.sbatch"), *words)
    assert job.wait() == "COMPLETED", job.output
    losses = [record["lm_loss"] for record in read_metrics(tmp_path / "run") if "lm_loss" in record]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5

    report = tmp_path / "report.json"
    words = ["--model", str(tmp_path / "run"), "--text", str(text), "--sequences", "16", "--output", str(report)]
    two_ranks = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    job = cluster.sbatch(tmp_path / "eval", *two_ranks, str(SLURM / "eval.sbatch"), *words)
    assert job.wait() == "COMPLETED", job.output
    assert json.loads(report.read_text())["model"] == str(tmp_path / "run")
