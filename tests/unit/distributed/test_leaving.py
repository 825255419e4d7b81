"""How a rank starts and leaves on a machine with GPUs; here they are pretended."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mor_megatron.config.schema import Config, ParallelConfig
from mor_megatron.distributed import initialize
from mor_megatron.pretraining import pretrain

PROGRAM = str(Path(__file__).parents[3] / "pretrain_mor.py")


@pytest.fixture
def end(monkeypatch, capsys):
    """end(backend, outcome) -> how the program ends if `pretrain` raises or returns that, and what it did before."""

    def run(backend: str, outcome: Exception | bool) -> tuple[list, str]:
        done = []

        def train(config):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        def exit_at_once(status):
            done.append(f"exit {status} at once")
            raise SystemExit(status)

        monkeypatch.setattr(pretrain, "pretrain", train)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
        monkeypatch.setattr(initialize.os, "_exit", exit_at_once)
        monkeypatch.setattr(sys, "argv", [PROGRAM, "--vocab-size", "64"])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # the program replaces both
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(PROGRAM, run_name="__main__")
        return [*done[:1], ended.value.code], capsys.readouterr().err

    return run


FAILURES = {RuntimeError("CUDA out of memory"): 1, ValueError("seed=x: use a number"): 2}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_rank_that_failed_does_not_wait_for_the_others_of_its_nccl_groups(end, failure):
    status = FAILURES[failure]
    done, said = end("nccl", failure)
    assert done == [f"exit {status} at once", status]
    assert str(failure) in said
    assert ("Traceback" in said) == (status == 1), "an error of the user is one line"


@pytest.mark.parametrize(("backend", "outcome", "status"), [("nccl", True, 0), ("nccl", False, 85), ("gloo", True, 0)])
def test_a_rank_that_is_done_takes_its_groups_down(end, backend, outcome, status):
    assert end(backend, outcome)[0] == ["destroy", status]


def test_groups_of_gloo_are_taken_down_after_a_failure_too(end):
    done, said = end("gloo", RuntimeError("a bug"))
    assert done == ["destroy", 1]
    assert "a bug" in said


@pytest.mark.parametrize(("visible", "index"), [(8, 5), (1, 0)], ids=["all of the node", "--gpus-per-task"])
def test_the_gpu_of_a_rank_is_one_that_it_sees(monkeypatch, visible, index):
    """DeepSpeed reads LOCAL_RANK for the index of the device."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    initialize._choose_gpu()
    assert (chosen, initialize.os.environ["LOCAL_RANK"]) == ([index], str(index))


def test_tensor_parallel_ranks_have_one_queue_to_the_gpu(monkeypatch):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "8")
    two = Config(parallel=ParallelConfig(tensor_model_parallel_size=2))
    initialize._choose_kernels(two)
    assert initialize.os.environ[name] == "8", "the user's choice stays"
    monkeypatch.delenv(name)
    initialize._choose_kernels(Config())
    assert name not in initialize.os.environ
    initialize._choose_kernels(two)
    assert initialize.os.environ[name] == "1"
