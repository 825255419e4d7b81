"""Slurm's commands and jobs in tests, and the run that the jobs execute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm"
PRETRAIN = str(SLURM / "pretrain.sbatch")
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
_FLAGS = """--num-layers 8 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 2 --num-recursions 3
    --routing expert_choice --vocab-size 64 --seq-length 64 --split 1,0,0 --micro-batch-size 2 --global-batch-size 48
    --lr-decay-style constant --eval-iters 0 --log-interval 1 --save-interval 10 --peak-tflops 1"""
SHORT, LONG = 40, 300
"""Iterations. On an idle machine one lasts a quarter of a second; the long run outlasts the minute until the signal."""
STARTED = "iteration {:8d}/"
"""What the log says of an iteration that is over."""


def flags(corpus: str, save: Path, iterations: int, *more: str) -> list[str]:
    """Arguments of pretrain_mor.py."""
    run = ["--train-iters", str(iterations), "--data-path", corpus, "--save", str(save)]
    return [*_FLAGS.split(), *run, *more]


@dataclass(frozen=True)
class Job:
    """A submitted job and the directory of its run."""

    number: str
    save: Path
    run: Callable[..., str]

    @property
    def output(self) -> str:
        """What its starts have printed so far."""
        path = self.save.with_suffix(".out")
        return path.read_text() if path.exists() else ""

    def field(self, name: str) -> str:
        """Of `scontrol show job`."""
        return re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", self.number))[1]

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
        """Until it has printed this."""
        self._wait(lambda: text in self.output, f"{text!r}", seconds)

    def wait(self, seconds: float = 600.0) -> str:
        """Until it has left the queue; its last state."""
        states = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"
        self._wait(lambda: self.field("JobState") in states, "its end", seconds)
        return self.field("JobState")

    def _wait(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{what} did not come:\n{self.output}"
            time.sleep(0.5)


class Cluster:
    """Slurm's commands, and a directory for runs."""

    def __init__(self, directory: Path):
        self.directory = directory
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD_SIZE", "MASTER"))}
        kept.pop("OMP_NUM_THREADS", None)  # the job's business
        self.environment = kept | {"SLURM_CONF": str(directory / "cluster" / "slurm.conf"), "PATH": path}

    def run(self, *command: str) -> str:
        """A command's output; it must succeed."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def sbatch(self, save: Path, *words: str) -> Job:
        """Submit; its output goes beside `save`."""
        line = self.run("sbatch", "--parsable", f"--output={save.with_suffix('.out')}", *words)
        return Job(line.strip(), save, self.run)
