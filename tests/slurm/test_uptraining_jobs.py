"""The steps of examples/uptraining as jobs: interruptions do not change their curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import STARTED, Cluster, Job
from curves import assert_same_curve
from small_runs import read_metrics, save_teacher, save_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ITERATIONS = 30
FLAGS = f"""--seq-length 64 --micro-batch-size 8 --split 1,0,0 --eval-iters 0 --train-iters {ITERATIONS}
    --save-interval 10 --lr-warmup-iters 0 --log-interval 1 --peak-tflops 1"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "max_position_embeddings": 64}
    path = save_teacher(tmp_path_factory.mktemp("dense"), **shape)
    return save_tokenizer(Path(path), "the of and")


@pytest.fixture
def submit(cluster: Cluster, corpus: str, dense: str):
    """submit(step, directory) calls the script as a user would, with the launcher in LAUNCH."""

    def call(step: str, directory: Path, *more: str) -> Job:
        save = directory / step
        options = f"--nodes 2 --gpus-per-node 1 --cpus-per-task 1 --time 20 --sbatch output={save}.out"
        launch = f"LAUNCH=python tools/launch_slurm.py {options} --"
        words = ["examples/uptraining/uptrain.sh", step, dense, str(directory), "--data-path", corpus, *FLAGS.split()]
        printed = cluster.run("env", launch, *words, *more)
        assert "layout: 2 ranks = TP 1 x PP 1 x DP 2" in printed
        assert ("teacher: " in printed) == (step == "recursive")
        return Job(re.search(r"^job (\d+):", printed, re.MULTILINE)[1], save, cluster.run)

    return call


def test_dense_to_recursive_to_routed(cluster, submit, dense, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
        cluster.run("examples/uptraining/uptrain.sh", "start", dense, str(directory), "--lora-rank", "4")

    for step in ("recursive", "routed"):
        more = ("--capacity-warmup-iters", "20") if step == "routed" else ()
        job = submit(step, whole, *more)
        assert job.wait() == "COMPLETED", job.output
        assert "start 1" not in job.output

        job = submit(step, parts, *more)
        job.wait_for(STARTED.format(13))
        if step == "recursive":
            cluster.run("scontrol", "requeue", job.number)
        else:
            cluster.run("scancel", job.number)
            assert job.wait() == "CANCELLED"
            job.wait_for("(SIGTERM): saved")
            job = submit(step, parts, *more)
        assert job.wait() == "COMPLETED", job.output
        assert f"resuming from {job.save}/iter_" in job.output
        assert job.output.count("fine-tuning from the weights of") == 1
        assert_same_curve(job.save, whole / step, ITERATIONS)

    assert all("distillation_kl" in line for line in read_metrics(parts / "recursive"))
    kept = [line["tokens_per_recursion_2"] for line in read_metrics(parts / "routed")]
    assert kept[0] > kept[10] > kept[20] == kept[-1]
