"""pretrain_mor.py as users start it: python, torchrun, deepspeed; and how it ends when something does not fit.

The quickstart's test starts it with a new interpreter, python alone.
"""

import sys
from pathlib import Path

import forked_ranks
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
PYTHON = []
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The package's console script sits beside the interpreter, activated environment or not.
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    """start(launcher, *flags) -> exit status and output."""
    directory = tmp_path_factory.mktemp("config")
    (directory / "model.yaml").write_text(MODEL + f"data-path: [{corpus}]\n")

    def run(launcher, *flags) -> tuple[int, str]:
        flags = ["--config", str(directory / "model.yaml"), *flags]
        if launcher == PYTHON:
            return forked_ranks.run_program("pretrain_mor.py", flags, directory)
        if launcher == DEEPSPEED:
            launcher = [*launcher, "--master_port", str(forked_ranks.free_port())]
        done = run_program([*launcher, str(ROOT / "pretrain_mor.py"), *flags], timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(PYTHON, id="python"),
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(DEEPSPEED, id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_launchers(start, tmp_path, launcher):
    status, output = start(launcher, "--save", str(tmp_path))
    assert status == 0, output[-6000:]
    lines = [line for line in output.splitlines() if " iteration        3/       3 | " in line]
    assert len(lines) == 1, "only rank 0 reports"
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 3]
    assert (tmp_path / "latest").read_text() == "iter_0000003\n"
    ranks = 1 if launcher == PYTHON else 2
    assert len(list((tmp_path / "iter_0000003").glob("state_*.safetensors"))) == ranks


def test_what_does_not_fit_is_one_line_and_exit_code_2(start, tmp_path):
    status, output = start(PYTHON, "--data-path", str(tmp_path / "missing"))
    assert status == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "missing.idx does not exist" in errors[0]
    assert "Traceback" not in output
