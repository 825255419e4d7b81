"""A family of runs: the paper's schedules, the content of its files, and invalid settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate
from mor_megatron.scaling.family import Recipe, plan_family, read_family, write_family
from mor_megatron.training.lr_schedule import learning_rate

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
BUDGETS = (2e18, 5e18, 16.5e18)


def method(*names: str) -> list[Path]:
    return [CONFIGS / f"{name}.yaml" for name in names]


@pytest.mark.parametrize(
    ("name", "warmup", "iterations", "branches"),
    [
        ("vanilla", 57, (1144, 2860, 9438), (915, 2288, 7550)),
        ("mor_expert_nr3", 86, (1716, 4291, 14160), (1373, 3433, 11328)),
    ],
)
def test_the_papers_schedules_at_360m(tmp_path, name, warmup, iterations, branches):
    """Published: warm-up 57 and 86; saved for the decays at 915, 2288, 7551 and at 1373, 3433, 11328."""
    family = plan_family(tmp_path, method(name), method("360m"), BUDGETS, [1])
    assert tuple(run.iterations for run, *_ in family) == iterations
    assert tuple(run.branch for run, *_ in family) == branches
    assert {config.optimizer.lr_warmup_iters for _, *pair in family for config in pair} == {warmup}


def test_trunk_and_decay_have_the_rate_of_one_wsd_run(tmp_path):
    ((run, trunk, decay),) = plan_family(tmp_path, method("vanilla"), method("360m"), [5e17], [1])
    whole = ["--train-iters", run.iterations, "--lr-warmup-iters", decay.optimizer.lr_warmup_iters]
    files = ["--config", *method("vanilla", "360m")]
    whole = validate(read_config([str(word) for word in (*files, *whole)]))
    rates = [learning_rate(whole.optimizer, n) for n in range(run.iterations)]
    trunk, decay = validate(trunk), validate(decay)
    assert [learning_rate(trunk.optimizer, n) for n in range(run.branch)] == rates[: run.branch]
    assert [learning_rate(decay.optimizer, n) for n in range(run.branch, run.iterations)] == rates[run.branch :]
    assert rates[run.branch] > rates[run.branch + 1] > rates[-1] > 0


def test_files_of_a_family(tmp_path):
    settings = ["--data-path", "corpus", "--keep-last", "2"]
    methods, sizes = method("vanilla", "mor_expert_nr3"), method("135m", "360m")
    family = plan_family(tmp_path / "f", methods, sizes, [16.5e18, 2e18], [1, 2], settings)
    assert len(family) == 2 * 2 * 2 * 2
    write_family(tmp_path / "f", family)
    assert read_family(tmp_path / "f") == [run for run, *_ in family]

    run, trunk, decay = family[1]
    assert (run.method, run.size, run.seed, run.label) == ("vanilla", "135m", 1, "1.65e19")
    assert read_config(["--config", str(run.configs[0])]) == trunk
    assert read_config(["--config", str(run.configs[1])]) == decay
    assert decay.checkpoint.branch_from == str(run.trunk / f"iter_{run.branch:07d}")
    assert trunk.checkpoint.keep_last is None, "it would delete what decays branch off"
    assert decay.checkpoint.keep_last == 2
    assert {config.checkpoint.load for config in (trunk, decay)} == {str(run.trunk), str(run.decay)}

    commands = [line for line in (tmp_path / "f/run.sh").read_text().splitlines() if "--config" in line]
    assert [command.split()[-1] for command in commands] == [str(path) for r, *_ in family for path in r.configs]
    for script in ("run.sh", "submit.sh"):
        subprocess.run(["sh", "-n", tmp_path / "f" / script], check=True)


def test_jobs_wait_for_their_part_of_the_trunk(tmp_path):
    """submit.sh and the real launcher, with an sbatch that only numbers what it gets."""
    for suffix in (".bin", ".idx"):  # the launcher looks whether they are there
        (tmp_path / f"corpus{suffix}").touch()
    corpus = ["--data-path", str(tmp_path / "corpus")]
    family = plan_family(tmp_path, method("vanilla"), method("135m"), [2e18, 5e18], [1], corpus)
    write_family(tmp_path, family)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$2" >> {tmp_path}/jobs\ncat "$2" >> {tmp_path}/scripts\nwc -l < {tmp_path}/jobs\n'
    )
    sbatch.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", tmp_path / "submit.sh", "--nodes", "2", "--gpus-per-node", "8", "--time", "1:00:00"]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "scripts").read_text().splitlines()
    given = [
        line.partition("=")[2] for line in lines if line.startswith(("#SBATCH --job-name", "#SBATCH --dependency"))
    ]
    names = [f"vanilla-135m-seed1-{part}" for part in ("trunk-2e18", "decay-2e18", "trunk-5e18", "decay-5e18")]
    assert given == [names[0], names[1], "afterok:1", names[2], "afterok:1", names[3], "afterok:3"]
    started = [line.split() for line in lines if line.startswith("set -- ")]
    assert [words[3] for words in started] == [str(path) for run, *_ in family for path in run.configs]
    assert lines.count("#SBATCH --nodes=2") == 4


REFUSALS = [
    ({"budgets": [2e14]}, r"budget=2e\+14 is 0 iterations of vanilla 360m"),
    ({"budgets": [2e18, 2e18]}, "budgets=2e.18 2e.18 must be different numbers above 0"),
    ({"budgets": [-1.0]}, "budgets=-1 must be different numbers above 0"),
    ({"budgets": [2e18, 2.0002e18]}, "budgets"),
    ({"seeds": [1, 1]}, "seeds=1 1 must be different"),
    ({"sizes": method("tiny"), "settings": ["--vocab-size", "64", "--global-batch-size", "None"]}, "global-batch-size"),
    ({"methods": method("vanilla", "vanilla")}, "two files have the same name"),
    ({"recipe": Recipe(decay_fraction=1.0)}, "decay-fraction=1.0 is out of range"),
    ({"settings": ["--no-such-thing", "1"]}, "unknown setting"),
    ({"settings": ["--hidden-size", "7"]}, "hidden-size=7 is not a multiple"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_a_family_refuses(tmp_path, change, message):
    arguments = {"methods": method("vanilla"), "sizes": method("360m"), "budgets": [2e18], "seeds": [1]} | change
    with pytest.raises(ValueError, match=message):
        plan_family(tmp_path, **arguments)


def test_no_family(tmp_path):
    with pytest.raises(ValueError, match=r"family.json cannot be read .*isoflops.py plan"):
        read_family(tmp_path)
    (tmp_path / "family.json").write_text('[{"method": "vanilla"}]')
    with pytest.raises(ValueError, match="is not the file that"):
        read_family(tmp_path)
