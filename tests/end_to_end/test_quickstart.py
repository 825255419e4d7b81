"""`make quickstart` on a small scale: the same steps on the text inside Python, for a few iterations."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

from forked_ranks import run_program
from small_runs import ROOT

QUICKSTART = ROOT / "examples" / "quickstart.py"
spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
quickstart = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = quickstart  # dataclasses look their module up
spec.loader.exec_module(quickstart)


def test_quickstart_ends_with_a_table_of_what_the_runs_reported(tmp_path, monkeypatch, capsys):
    """The data's tools are forks; both runs are processes of their own."""

    def run(command: list) -> None:
        status, output = run_program(command[0], command[1:], tmp_path / "tool")
        assert status == 0, output

    monkeypatch.setattr(quickstart, "run", run)
    size = "--hidden-size 32 --seq-length 64 --micro-batch-size 4 --global-batch-size 4"
    flags = f"--train-iters 6 --lr-warmup-iters 1 --eval-interval 3 --eval-iters 1 {size}"
    quickstart.main(["--output", str(tmp_path), "--sources", "cpython", "--flags", *flags.split()])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(.*?)  +(\S+ +\S+)$", printed.partition("== Compare")[2], re.MULTILINE))
    table = {name: values.split() for name, values in rows.items()}
    assert table[""] == ["MoR", "vanilla"]

    for column, name in enumerate(("mor", "vanilla")):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [record["lm_loss"] for record in records if "lm_loss" in record]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
        for key in ("topk", "threshold"):
            (label,) = (label for label in table if key in label.replace("top-k", "topk"))
            assert table[label][column] == f"{records[-1][f'validation_loss_{key}']:.3f}"
    unique, flops = table["unique parameters"], table["executed training FLOPs (1e12)"]
    # 4 unique layers against 8, and capacities of 1, 2/3, 1/3 over the shared ones.
    assert int(unique[0].replace(",", "")) < int(unique[1].replace(",", ""))
    assert 0.5 < float(flops[0]) / float(flops[1]) < 1
    for picture in ("loss.png", "routing.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_failing_step_ends_the_quickstart_with_its_status(tmp_path):
    done = subprocess.run(
        [sys.executable, QUICKSTART, "--output", tmp_path, "--sources", "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "== Train a tokenizer" not in done.stdout
    assert "nowhere" in done.stderr
