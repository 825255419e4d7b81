"""Training processes as srun starts them: one is killed during training, and the others stop and name it."""

from __future__ import annotations

import os
import re
import signal
import socket

import pytest
from forked_ranks import free_port, running
from small_runs import SMALL_MODEL

FLAGS = f"{SMALL_MODEL} --train-iters 1000000 --eval-iters 0 --log-interval 5"
LIMIT = 120.0  # seconds until a rank counts as hung; 10 are the rule


def a_job() -> str:
    """A job number whose port is free."""
    with socket.socket() as probe:
        for port in range(10000 + os.getpid() % 20000, 30000):
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port - 10000)
    raise AssertionError("no port is free")


def as_srun(count: int) -> list[dict[str, str]]:
    """What Slurm tells each task."""
    job = {"SLURM_JOB_ID": a_job(), "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(count)}
    return [job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(count)]


@pytest.mark.parametrize(
    ("count", "victim", "layout"),
    [
        pytest.param(2, 1, "", id="dp2"),
        pytest.param(
            4, 2, "--pipeline-model-parallel-size 2 --micro-batch-size 2", id="pp2-dp2", marks=pytest.mark.slow
        ),
    ],
)
def test_the_others_stop_and_name_it(corpus, tmp_path, count, victim, layout):
    with running([*FLAGS.split(), *layout.split(), "--data-path", corpus], count, tmp_path, launcher=as_srun) as ranks:
        ranks.wait_for("iteration       10/")
        ranks.signal(signal.SIGKILL, victim)
        statuses = ranks.join()
        outputs = [ranks.output(rank) for rank in range(count)]
        lost = ranks.processes[victim].pid
    assert all(status == 1 for rank, status in enumerate(statuses) if rank != victim), outputs
    reports = re.findall(r"^error: .*", "\n".join(outputs), re.MULTILINE)
    assert len(reports) == 1
    assert re.match(
        rf"error: lost rank {victim} \(\S+, process {lost}, [^)]*\) of {count} in iteration \d+; ",
        reports[0],
    )


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_stacks_are_left(corpus, tmp_path):
    flags = f"{FLAGS} --pipeline-model-parallel-size 2 --distributed-timeout-minutes 0.1 --save {tmp_path}/run"
    with running([*flags.split(), "--data-path", corpus], 2, tmp_path) as ranks:
        ranks.wait_for("iteration       10/")
        ranks.signal(signal.SIGSTOP, 1)
        ranks.processes[0].join(LIMIT)
        assert ranks.processes[0].exitcode == 1
        output = ranks.output(0)
    (report,) = re.findall(r"^error: .*", output, re.MULTILINE)
    assert re.match(r"error: lost rank 1 \(.*, pipeline stage 1 of 2\) of 2 in iteration \d+; rank 0: .*", report)
    assert "train_step" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_lost_before_all_have_met_is_missed(corpus, tmp_path, victim):
    """Also where it is the one at whose address they meet; the next start at that address does not meet the rest."""
    flags = [*f"{FLAGS} --data-path {corpus} --distributed-timeout-minutes".split(), "0.05"]
    port = {"MASTER_PORT": str(free_port())}
    with running(flags, 2, tmp_path, port | {"TORCHELASTIC_RUN_ID": "first"}) as ranks:
        ranks.signal(signal.SIGKILL, victim)
        other = 1 - victim
        if victim == 0:
            again = [*flags[:-1], "1", "--train-iters", "1"]
            with running(again, 2, tmp_path / "again", port | {"TORCHELASTIC_RUN_ID": "second"}) as others:
                assert others.join() == [0, 0], others.output(0)
        ranks.processes[other].join(LIMIT)
        assert ranks.processes[other].exitcode == 1
        output = ranks.output(other)
    assert re.search(
        rf"^error: rank {other} did not meet all 2 ranks at 127\.0\.0\.1:\d+ within 0\.05 min", output, re.M
    )
    assert "Traceback" not in output
