"""All runs of a family in one process, one after another: start-up is long beside the runs of a small experiment."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from mor_megatron.config.cli import read_config
from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.scaling.family import Run, checkpoint_of


def train_family(runs: Iterable[Run]) -> bool:
    """Train what has not finished, each trunk before its decays.

    Returns:
        Whether all of it is finished; False: a signal or a time limit stopped it, and the run at hand was saved.
    Raises:
        ValueError: settings, data or checkpoint do not fit; and what else `pretrain` raises.
    """
    for run in runs:
        for path in run.configs:
            config = read_config(["--config", str(path)])
            if not checkpoint_of(config.checkpoint.save, config.training.train_iters).exists():
                print(f"== {path}", flush=True)
                if not pretrain(config):
                    return False
                gc.collect()  # engines refer to themselves
    return True
