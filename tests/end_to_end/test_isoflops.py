"""A small isoFLOP family: planned, trained in one process, reported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, VOCABULARY, read_metrics

from mor_megatron.planning.accounting import training_flops_per_token
from mor_megatron.scaling.family import plan_family, read_family, write_family
from mor_megatron.scaling.results import read_result
from mor_megatron.scaling.train import train_family

BASE = f"""num-layers: 5
vocab-size: {VOCABULARY}
seq-length: 24
micro-batch-size: 8
global-batch-size: 8
split: 80,20,0
eval-iters: 2
lr: 1e-2
peak-tflops: 1
"""


def write_settings(directory: Path, corpus: str, widths: tuple[int, ...]) -> dict[str, list[Path]]:
    """Files of two methods and of sizes."""
    texts = {
        "vanilla": "num-recursions: 1\n",
        "mor": "num-recursions: 3\nrouting: expert_choice\n",
        **{f"h{w}": f"{BASE}data-path: {corpus}\nhidden-size: {w}\nffn-hidden-size: {2 * w}\n" for w in widths},
    }
    paths = {name: directory / f"{name}.yaml" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    return {"methods": [paths["vanilla"], paths["mor"]], "sizes": [paths[f"h{width}"] for width in widths]}


def report(directory: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "isoflops.py"), "report", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_results_are_those_of_the_trunk_and_the_decay(process_group, corpus, tmp_path):
    files = write_settings(tmp_path, corpus, (16,))
    directory = tmp_path / "family"
    family = plan_family(directory, files["methods"][1:], files["sizes"], [8e7, 1.2e8], [1])
    write_family(directory, family)
    remedy = f"train the family, for example with {directory}/run.sh"
    assert report(directory).stderr == f"error: {directory}: no run has finished: {remedy}\n"
    runs = read_family(directory)
    assert read_result(runs[0]) is None
    assert train_family(runs)

    run, _, config = family[1]
    got = read_result(run)
    steps = [line for line in read_metrics(run.trunk) if line["iteration"] <= run.branch]
    assert len(steps) == run.branch, "the trunk is trained once for all budgets"
    decay = read_metrics(run.decay)
    assert [line["iteration"] for line in decay if "lm_loss" in line] == list(range(run.branch + 1, run.iterations + 1))
    last = decay[-1]
    assert (got.topk, got.threshold) == (last["validation_loss_topk"], last["validation_loss_threshold"])
    assert got.topk != got.threshold
    assert got.tokens == run.iterations * 8 * 24
    # All 24 tokens at recursion 0, then 16 and 8: what is planned.
    assert got.executed_flops == pytest.approx(got.tokens * training_flops_per_token(config).model)
    assert not (run.trunk / f"iter_{run.iterations:07d}").exists()


@pytest.mark.slow
def test_a_family_from_plan_to_report(corpus, tmp_path):
    """Through the command line: two methods, three sizes, two budgets, two seeds."""
    files, directory = write_settings(tmp_path, corpus, (8, 12, 16)), tmp_path / "family"

    def isoflops(*words) -> str:
        command = [sys.executable, ROOT / "tools" / "isoflops.py", *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["--budgets", "2e8", "4e8", "--seeds", "1", "2", "--methods", *files["methods"], "--sizes"]
    planned = isoflops(
        "plan", "--output", directory, *options, *files["sizes"], "--settings", "--num-attention-heads", 2
    )
    assert "24 runs" in planned
    assert sorted(isoflops("train", directory, "--jobs", "2").splitlines()) == sorted(
        f"{method}-h{width}-seed{seed}: finished"
        for method in ("vanilla", "mor")
        for width in (8, 12, 16)
        for seed in (1, 2)
    )
    assert "==" not in isoflops("train", directory), "everything had finished"
    tables = report(directory)
    assert tables.returncode == 0
    rows = [line.split(" | ") for line in tables.stdout.splitlines() if re.match(r"\| [24]e\+08 ", line)]
    rows = [row for row in rows if len(row) == 11]  # the first table
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        budget, executed, iterations = float(row[0].strip("| ")), float(row[7]), int(row[5].replace(",", ""))
        # A budget is forward and without the head; rounding to whole iterations is the rest.
        assert 3 * budget * (1 - 1 / iterations) < executed < 8 * budget, row
    assert (directory / "isoflops.png").stat().st_size > 10_000
