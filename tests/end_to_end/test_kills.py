"""Ranks killed at random instants, also during saves: the same command continues, with the curve of an undisturbed run.

A run is started, killed (one rank or all), and started again with the same command until it reaches its end; then the
next run starts, until the number of kills is reached. `pytest -m slow -s tests/end_to_end/test_kills.py` kills a
hundred times and prints the outcome of each kill.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked_ranks import Ranks, running
from small_runs import SMALL_MODEL, assert_same_checkpoint, read_metrics

from mor_megatron.checkpointing.directory import PARTIAL

ITERATIONS = 8
FLAGS = f"""{SMALL_MODEL} --num-layers 6 --num-recursions 2
    --train-iters {ITERATIONS} --lr-warmup-iters 2 --eval-interval 4 --eval-iters 1
    --log-interval 1 --save-interval 1 --keep-last 3 --distributed-timeout-minutes 0.5""".split()
LAYOUTS = {"dp2": [], "tp2": ["--tensor-model-parallel-size", "2"], "pp2": ["--pipeline-model-parallel-size", "2"]}
BEGINS = "utilisation is measured"
"""What rank 0 prints before the first iteration."""


@dataclass
class Kill:
    """What a kill did, one line of the table."""

    layout: str
    saving: str
    victims: str
    instant: float
    """Seconds after the start."""
    reported: int
    """The last iteration in metrics.jsonl."""
    found: str
    """What the directory holds: the newest checkpoint, and remains."""
    resumed: str = ""
    """Where the next attempt began."""
    curve: str = "not looked at"

    def __str__(self) -> str:
        return (
            f"{self.layout:6} {self.saving:10} {self.victims:6} {self.instant:7.3f} s  {self.reported:4}  "
            f"{self.found:36} {self.resumed:14} {self.curve}"
        )


TITLE = "layout saving     killed  instant   iter.  found on disk                        resumed from   curve"


class Campaign:
    """Runs of one layout that are killed again and again."""

    def __init__(self, corpus: str, layout: str, directory: Path, seed: int):
        self.flags = [*FLAGS, *LAYOUTS[layout], "--data-path", corpus]
        self.layout, self.directory = layout, directory
        self.random = random.Random(f"{layout} {seed}")
        self.kills: list[Kill] = []
        with self.attempt(directory / "whole", []) as ranks:
            ranks.wait_for(BEGINS)
            begin = ranks.elapsed()
            assert ranks.join() == [0, 0], ranks.output(0)
            self.times = begin, ranks.elapsed()

    def attempt(self, save: Path, more: list[str]):
        flags = [*self.flags, "--save", str(save), "--load", str(save), *more]
        return running(flags, 2, self.directory / "logs")

    def run(self, count: int) -> None:
        """Kill `count` times; every run is brought to its end."""
        number = 0
        while len(self.kills) < count:
            number += 1
            more = ["--async-save"] if self.random.random() < 0.5 else []
            self._one_run(self.directory / f"run_{number}", more, count - len(self.kills))

    def _one_run(self, save: Path, more: list[str], most: int) -> None:
        mine: list[Kill] = []
        while True:
            with self.attempt(save, more) as ranks:
                kill = self._kill(ranks, save, bool(more)) if len(mine) < most else None
                statuses = ranks.join()
                output = ranks.output(0)
            if mine and not mine[-1].resumed:
                mine[-1].resumed = resumed_from(output)
            if statuses == [0, 0]:
                break
            assert kill is not None, output
            kill.reported, kill.found = last_reported(save), found_on_disk(save)
            mine.append(kill)
        self.kills += mine
        whole = self.directory / "whole"
        same = read_metrics(save) == read_metrics(whole)
        for kill in mine:
            kill.curve = "equal" if same else "DIFFERS"
        assert same, f"{self.layout}: the curve after {len(mine)} kills differs\n" + "\n".join(map(str, mine))
        assert_same_checkpoint(save, whole, ITERATIONS)
        shutil.rmtree(save)

    def _kill(self, ranks: Ranks, save: Path, asynchronous: bool) -> Kill:
        """At a random instant: one in five anywhere, the others after training has begun, where saves are frequent."""
        begin, end = self.times
        if self.random.random() < 0.2:
            ranks.wait_until(self.random.uniform(0.0, begin))
        else:
            delay = self.random.uniform(0.0, end - begin)
            while BEGINS not in ranks.output(0) and ranks.is_alive():
                ranks.wait_until(ranks.elapsed() + 0.01)
            ranks.wait_until(ranks.elapsed() + delay)
        victims = self.random.choice([(0,), (1,), (0, 1), (0, 1), (0, 1)])
        instant = ranks.elapsed()
        ranks.signal(signal.SIGKILL, *victims)
        saving = "background" if asynchronous else "waited for"
        return Kill(self.layout, saving, "all" if len(victims) == 2 else f"rank {victims[0]}", instant, 0, "")


def last_reported(save: Path) -> int:
    path = save / "metrics.jsonl"
    found = re.findall(r'"iteration": (\d+)', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


def found_on_disk(save: Path) -> str:
    names = sorted(path.name for path in save.glob("iter_*"))
    complete = [name for name in names if re.fullmatch(r"iter_\d+", name)]
    remains = [name for name in names if name.endswith(PARTIAL)]
    return (complete[-1] if complete else "nothing") + (f", {remains[-1]}" if remains else "")


def resumed_from(output: str) -> str:
    found = re.findall(r"resuming from \S*(iter_\d+)", output)
    return found[-1] if found else "the beginning"


def carry_out(corpus: str, directory: Path, counts: dict[str, int], seed: int) -> list[Kill]:
    kills = []
    print(f"\n{TITLE}")
    for layout, count in counts.items():
        campaign = Campaign(corpus, layout, directory / layout, seed)
        campaign.run(count)
        print(*campaign.kills, sep="\n", flush=True)
        kills += campaign.kills
    return kills


def test_three_kills(corpus, tmp_path):
    """All ranks or one, with saves in the background or waited for, amid the iterations: what the seed gives."""
    kills = carry_out(corpus, tmp_path, {"dp2": 1, "tp2": 1, "pp2": 1}, seed=343)
    assert len(kills) == 3
    assert any(kill.resumed.startswith("iter_") for kill in kills), "some should come after a checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills(corpus, tmp_path):
    seed = int(os.environ.get("KILL_SEED", random.randrange(1000)))
    print(f"\nKILL_SEED={seed}")
    kills = carry_out(corpus, tmp_path, {"dp2": 34, "tp2": 33, "pp2": 33}, seed)
    assert len(kills) == 100
    assert sum(kill.resumed.startswith("iter_") for kill in kills) > 30
    assert any(PARTIAL in kill.found for kill in kills), "some should fall into a save"
