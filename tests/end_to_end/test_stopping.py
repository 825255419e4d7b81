"""Runs stopped by a signal to any rank, by a time limit, or at an iteration: they save, report it, and can continue."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_ranks import LIMIT, launcher, running
from small_runs import SMALL_MODEL, assert_same_checkpoint, read_metrics

from mor_megatron.checkpointing.directory import candidates

FLAGS = f"{SMALL_MODEL} --lr-decay-style constant --eval-iters 0 --log-interval 1".split()
FOREVER = ["--train-iters", "1000000"]


def heartbeat(directory: Path) -> dict:
    return json.loads((directory / "heartbeat.json").read_text())


def flags(corpus: str, directory: Path, *more: str) -> list[str]:
    return [*FLAGS, "--data-path", corpus, "--save", str(directory), "--load", str(directory), *more]


@pytest.mark.parametrize(
    ("number", "rank", "layout"),
    [
        (signal.SIGUSR1, 1, []),
        (signal.SIGTERM, 0, ["--pipeline-model-parallel-size", "2"]),
        pytest.param(signal.SIGTERM, 1, ["--tensor-model-parallel-size", "2"], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, ["--async-save", "--num-workers", "2"], marks=pytest.mark.slow),
    ],
    ids=["usr1-dp2", "term-pp2", "term-tp2", "int-workers"],
)
def test_a_signal_to_one_rank_saves_and_stops_all(corpus, tmp_path, number, rank, layout):
    save = tmp_path / "run"
    with running(flags(corpus, save, *FOREVER, *layout), 2, tmp_path / "logs") as ranks:
        ranks.wait_for("iteration        3/")
        ranks.signal(number, rank)
        assert ranks.join() == [85, 85], ranks.output(0)
        output = ranks.output(0)
    assert f"({number.name}): saved" in output
    (newest,) = candidates(save)
    last = read_metrics(save)[-1]["iteration"]
    assert newest.name == f"iter_{last:07d}", "the last iteration is the one that is saved"
    assert heartbeat(save)["state"] == "stopped"
    assert heartbeat(save)["iteration"] == last

    # The same command goes on, and together they are what one run is.
    end = ["--train-iters", str(last + 3)]
    for directory in (save, tmp_path / "whole"):
        with running(flags(corpus, directory, *end, *layout), 2, tmp_path / "logs") as ranks:
            assert ranks.join() == [0, 0], ranks.output(0)
    assert read_metrics(save) == read_metrics(tmp_path / "whole")
    assert_same_checkpoint(save, tmp_path / "whole", last + 3)
    assert heartbeat(save)["state"] == "finished"


def test_ranks_do_not_outlive_their_launcher(corpus, tmp_path):
    save = tmp_path / "run"
    with launcher(flags(corpus, save, *FOREVER), tmp_path / "logs") as (process, output):
        wait_for(lambda: "iteration        2/" in output(0), output)
        process.kill()
        wait_for(lambda: all("exit status" in output(rank) for rank in (0, 1)), output)
        assert all("exit status 85\n" in output(rank) for rank in (0, 1))
        assert "(the launcher has died): saved" in output(0)
    (newest,) = candidates(save)
    assert heartbeat(save)["state"] == "stopped"
    assert newest.name == f"iter_{heartbeat(save)['iteration']:07d}"
    assert not (save / "lock.json").exists()


def wait_for(condition: Callable[[], bool], output: Callable[[int], str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, output(0)[-3000:]
        time.sleep(0.01)


def test_a_second_sigint_ends_it_at_once(corpus, tmp_path):
    """Also where the main thread waits for another rank, which is stopped here."""
    with running(flags(corpus, tmp_path / "run", *FOREVER), 2, tmp_path / "logs") as ranks:
        ranks.wait_for("iteration        2/")
        ranks.signal(signal.SIGSTOP, 1)
        time.sleep(0.3)  # rank 0 comes to wait for it
        ranks.signal(signal.SIGINT, 0)
        time.sleep(0.3)
        assert ranks.processes[0].is_alive(), "the first one asks for a checkpoint"
        ranks.signal(signal.SIGINT, 0)
        ranks.processes[0].join(5.0)
        assert ranks.processes[0].exitcode == 130
    assert candidates(tmp_path / "run") == []


def test_exit_interval_and_duration(corpus, tmp_path):
    save = tmp_path / "run"
    with running(flags(corpus, save, *FOREVER, "--exit-interval", "3"), 1, tmp_path / "logs") as ranks:
        assert ranks.join() == [85]
        assert "stopping after iteration 3 (exit-interval=3): saved" in ranks.output(0)
    with running(flags(corpus, save, *FOREVER, "--exit-duration-in-mins", "1e-4"), 1, tmp_path / "logs") as ranks:
        assert ranks.join() == [85]
        assert "stopping after iteration 4 (exit-duration-in-mins=0.0001): saved" in ranks.output(0)
    assert [path.name for path in candidates(save)] == ["iter_0000004", "iter_0000003"]


def test_without_the_handler_a_signal_ends_the_process(corpus, tmp_path):
    command = [*flags(corpus, tmp_path / "run", *FOREVER), "--exit-signal-handler", "false"]
    with running(command, 1, tmp_path / "logs") as ranks:
        ranks.wait_for("iteration        2/")
        ranks.signal(signal.SIGTERM, 0)
        assert ranks.join() == [-signal.SIGTERM]
    assert candidates(tmp_path / "run") == []
