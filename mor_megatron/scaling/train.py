"""Train all runs of a family in one process: in a small experiment, start-up takes long compared with a run."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from mor_megatron.config.cli import read_config
from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.scaling.family import Run, checkpoint_of


def train_family(runs: Iterable[Run]) -> bool:
    """Train all runs that have not finished, each trunk before its decays.

    Returns:
        Whether all runs have finished. False: a signal or a time limit stopped the current run, which was saved.
    Raises:
        ValueError: settings, data or checkpoint do not fit. Other errors of `pretrain` are passed on.
    """
    for run in runs:
        for path in run.configs:
            config = read_config(["--config", str(path)])
            if not checkpoint_of(config.checkpoint.save, config.training.train_iters).exists():
                print(f"== {path}", flush=True)
                if not pretrain(config):
                    return False
                gc.collect()  # engines refer to themselves, so they need the garbage collector
    return True
