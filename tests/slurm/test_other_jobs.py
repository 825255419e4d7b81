"""From text to an evaluated model by the batch files alone: preprocess, merge, pretrain_cpu, eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from cluster import ROOT, SLURM, Job
from small_runs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in topics.values()))
    return path


@pytest.fixture(scope="module")
def tokenizer(cluster, text) -> list[str]:
    """Flags."""
    words = ["--vocab-size", "500", "--model-type", "bpe", "--output-prefix", str(text.with_name("tok"))]
    cluster.run(sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--input", str(text), *words)
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(text.with_name("tok.model"))]


@pytest.fixture(scope="module")
def corpus(cluster, text, tokenizer) -> str:
    """Prefix of a corpus that one job has made."""
    words = ["--input", str(text), "--output-prefix", str(text.with_name("docs")), "--append-eod", *tokenizer]
    job = cluster.sbatch(text.with_name("job"), "--cpus-per-task=2", str(SLURM / "preprocess.sbatch"), *words)
    assert job.wait() == "COMPLETED", job.output
    return str(text.with_name("docs_text_document"))


def test_shards_are_made_apart_and_merged_and_a_failed_one_is_made_again(cluster, text, tokenizer, corpus, tmp_path):
    prefix = f"{tmp_path}/docs_text_document"
    in_the_way = Path(f"{prefix}.shard-00002-of-00003.idx")
    in_the_way.mkdir()

    def make(*numbers: int) -> tuple[list[str], Job]:
        """States of these shards, and the job that would join all."""
        array = ["--cpus-per-task=1", f"--array={','.join(map(str, numbers))}", str(SLURM / "preprocess.sbatch")]
        words = ["--shard", "%a/3", "--input", str(text), "--output-prefix", f"{tmp_path}/docs", "--append-eod"]
        job = cluster.sbatch(tmp_path / "shards", *array, *words, *tokenizer)
        after = [f"--dependency=afterok:{job.number}", str(SLURM / "merge.sbatch")]
        merge = cluster.sbatch(tmp_path / "merge", *after, "--shards", "3", "--output-prefix", prefix)
        return [Job(f"{job.number}_{number}", job.save, job.run).wait() for number in numbers], merge

    states, merge = make(1, 2, 3)
    assert states == ["COMPLETED", "FAILED", "COMPLETED"]
    assert merge.wait() == "CANCELLED"
    in_the_way.rmdir()
    states, merge = make(2)
    assert states == ["COMPLETED"]
    assert merge.wait() == "COMPLETED", merge.output
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{corpus}{suffix}").read_bytes()


def test_pretrain_evaluate(cluster, text, tokenizer, corpus, tmp_path):
    corpus = ["--data-path", corpus]

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
