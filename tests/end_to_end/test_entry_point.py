"""pretrain_mor.py as users start it: python, torchrun, deepspeed; and how it ends when something does not fit."""

import socket
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, read_metrics, run_program

MODEL = """num-layers: 5
hidden-size: 32
ffn-hidden-size: 48
num-attention-heads: 2
num-recursions: 3
routing: expert_choice
vocab-size: 64
seq-length: 24
split: 80,20,0
micro-batch-size: 2
global-batch-size: 4
train-iters: 3
eval-iters: 1
peak-tflops: 1
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The package's console script sits beside the interpreter, activated environment or not.
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "model.yaml"
    config.write_text(MODEL + f"data-path: [{corpus}]\n")

    def run(launcher, *flags):
        if launcher == DEEPSPEED:
            launcher = [*launcher, "--master_port", str(free_port())]
        program = [str(ROOT / "pretrain_mor.py"), "--config", str(config), *flags]
        return run_program([*launcher, *program], timeout=300)

    return run


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([sys.executable], id="python"),
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(DEEPSPEED, id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_launchers(start, tmp_path, launcher):
    process = start(launcher, "--save", str(tmp_path))
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    lines = [line for line in process.stdout.splitlines() if " iteration        3/       3 | " in line]
    assert len(lines) == 1, "only rank 0 reports"
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 3]
    assert (tmp_path / "latest").read_text() == "iter_0000003\n"
    ranks = 1 if launcher == [sys.executable] else 2
    assert len(list((tmp_path / "iter_0000003").glob("state_*.safetensors"))) == ranks


def test_what_does_not_fit_is_one_line_and_exit_code_2(start, tmp_path):
    process = start([sys.executable], "--data-path", str(tmp_path / "missing"))
    assert process.returncode == 2
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "missing.idx does not exist" in errors[0]
    assert "Traceback" not in process.stderr
