"""The batch script under a real Slurm on one machine: interruptions of a job do not change the curve.

Two nodes with one rank each train on the CPU; their GPUs are fake. Every job is the file of the examples, submitted
with other numbers. Every completed job has the loss curve and the checkpoint of an uninterrupted run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import LONG, ROOT, SHORT, SLURM, STARTED, Cluster, Job, flags
from curves import assert_same_curve
from small_runs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def rank_process(job: Job, rank: int) -> int:
    """Process number of a rank of a running job."""
    wanted = {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if command.split(b"\0")[1:2] == [b"pretrain_mor.py"] and wanted <= set(environment):
            return int(process.name)
    raise AssertionError(f"rank {rank} of job {job.number} is not running")


def test_the_time_limit_saves_and_requeues(cluster, pretrain, whole):
    job = pretrain("limit", LONG, options=("--time=2", "--signal=USR1@60"))
    job.wait_for("start 0: stopped early")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")  # once is enough on a busy machine
    assert job.wait() == "COMPLETED", job.output
    restarts = int(job.field("Restarts"))
    assert restarts >= 1
    assert job.output.count("(SIGUSR1): saved") == restarts
    assert job.output.count("stopped early, checkpoint saved: back into the queue") == restarts
    assert job.output.count("resuming from") == restarts
    assert "training is complete" in job.output
    assert_same_curve(job.save, whole, LONG)


def test_requeue_by_hand_saves_and_goes_on(cluster, pretrain, whole):
    job = pretrain("by-hand", SHORT)
    job.wait_for(STARTED.format(25))
    cluster.run("scontrol", "requeue", job.number)
    assert job.wait() == "COMPLETED", job.output
    assert job.field("Restarts") == "1"
    (stopped,) = re.findall(r"stopping after iteration (\d+) \(SIGTERM\): saved", job.output)
    assert f"resuming from {job.save}/iter_{int(stopped):07d}" in job.output
    assert_same_curve(job.save, whole, SHORT)


def test_a_node_that_goes_down(cluster, pretrain, whole):
    job = pretrain("node-down", SHORT)
    job.wait_for(STARTED.format(25))
    cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    try:
        assert job.wait() == "COMPLETED", job.output
        assert "node1" not in cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split()
    finally:
        cluster.run("scontrol", "update", "NodeName=node1", "State=RESUME")
    assert job.field("Restarts") == "1"
    assert_same_curve(job.save, whole, SHORT)


def test_a_lost_rank_is_named_and_the_job_tried_again(pretrain, whole):
    job = pretrain("lost-rank", SHORT)
    job.wait_for(STARTED.format(25))
    os.kill(rank_process(job, 1), signal.SIGKILL)
    assert job.wait() == "COMPLETED", job.output
    assert job.field("Restarts") == "1"
    assert "error: lost rank 1" in job.output
    assert "broke down (status 137) after a new checkpoint: back into the queue" in job.output
    assert_same_curve(job.save, whole, SHORT)


def test_what_breaks_down_at_once_is_not_tried_for_ever(pretrain):
    job = pretrain("hopeless", SHORT)
    job.wait_for(STARTED.format(3))
    os.kill(rank_process(job, 1), signal.SIGKILL)
    assert job.wait() == "FAILED"
    assert (job.field("ExitCode"), job.field("Restarts")) == ("137:0", "0")
    assert "broke down (status 137) without a new checkpoint: not put back into the queue" in job.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lrr", "1"], "error: unknown setting lrr (command line): did you mean lr?"),
        (["--data-path", "/nowhere"], "/nowhere"),
        (["--save", ""], "error: no --save among the arguments of this job"),
    ],
    ids=["flag", "data", "save"],
)
def test_what_does_not_fit_is_not_requeued(pretrain, more, message):
    job = pretrain("unfit", SHORT, *more)
    assert job.wait() == "FAILED"
    assert (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0")
    assert message in job.output


def test_a_cancelled_job_saves_and_stays_away_until_it_is_submitted_again(cluster, pretrain, whole):
    job = pretrain("cancelled", SHORT)
    job.wait_for(STARTED.format(5))
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    job.wait_for("(SIGTERM): saved", seconds=30)
    assert job.field("Restarts") == "0"
    again = pretrain("cancelled", SHORT)
    assert again.wait() == "COMPLETED", again.output
    assert f"resuming from {job.save}/iter_" in again.output
    assert_same_curve(again.save, whole, SHORT)


def test_a_start_after_the_first_does_not_fine_tune_anew(cluster, pretrain, whole):
    job = pretrain("fine-tuned", SHORT, "--load", str(whole), "--finetune", "--exit-interval", "20")
    assert job.wait() == "COMPLETED", job.output
    assert job.output.count("fine-tuning from the weights") == 1
    assert job.output.count(f"resuming from {job.save}/iter_0000020") == 1
    assert [record["iteration"] for record in read_metrics(job.save)] == list(range(1, SHORT + 1))


def launch(cluster: Cluster, partition: str, arguments: list[str]) -> subprocess.CompletedProcess:
    options = f"--nodes 2 --gpus-per-node 1 --cpus-per-task 1 --time 10 --partition {partition} --"
    command = [sys.executable, "tools/launch_slurm.py", *options.split(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False)


def test_the_launcher_submits_what_it_keeps(cluster, corpus, tmp_path, whole):
    save = tmp_path / "launched"
    arguments = flags(corpus, save, 10)
    ran = launch(cluster, "nowhere", arguments)
    assert ran.returncode == 1
    assert "error: sbatch refuses the job:" in ran.stderr.splitlines()[-1]
    assert "invalid partition" in ran.stderr.splitlines()[-1]

    ran = launch(cluster, "debug", arguments)
    assert ran.returncode == 0, ran.stderr
    assert "layout: 2 ranks = TP 1 x PP 1 x DP 2" in ran.stderr
    (script,) = save.glob("job-*.sbatch")
    job = Job(script.stem.removeprefix("job-"), save, cluster.run)
    assert job.wait() == "COMPLETED"
    assert "training is complete" in (save / f"slurm-{job.number}.out").read_text()
    assert_same_curve(save, whole, 10)


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_would_run_every_file(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", str(script))
