"""A Slurm cluster of four nodes on this machine, and the run that its jobs are compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import LONG, PRETRAIN, ROOT, SLURM, TWO_NODES, Cluster, Job, flags

sys.path.append(str(ROOT / "tests" / "end_to_end"))

from small_runs import write_corpus

LAPTOP = str(SLURM / "laptop_cluster.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Slurm, installed from the distribution's packages if need be."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("Slurm is installed and started here by root on Debian or Ubuntu only")
    if shutil.which("slurmctld") is None and subprocess.run([LAPTOP, "install"], check=False).returncode:
        pytest.skip("Slurm's packages cannot be installed here")
    directory = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(directory)
    cluster.run(LAPTOP, "start", str(directory / "cluster"))
    try:
        yield cluster
    finally:
        cluster.run(LAPTOP, "stop", str(directory / "cluster"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def pretrain(cluster, corpus, tmp_path) -> Callable[..., Job]:
    """pretrain(name, iterations, *flags, options=...) submits the batch script of the examples to two nodes."""

    def submit(name: str, iterations: int, *more: str, options: tuple[str, ...] = ("--time=20",)) -> Job:
        save = tmp_path / name
        return cluster.sbatch(save, *TWO_NODES, *options, PRETRAIN, *flags(corpus, save, iterations, *more))

    return submit


@pytest.fixture(scope="session")
def whole(cluster, corpus) -> Path:
    """Directory of the long run, which nothing interrupts."""
    save = cluster.directory / "whole"
    job = cluster.sbatch(save, *TWO_NODES, "--time=20", PRETRAIN, *flags(corpus, save, LONG))
    assert job.wait() == "COMPLETED", job.output
    assert "start 1" not in job.output
    return save
