"""examples/science/uptraining.py: runs that were stopped go on, and are evaluated and reported when they are done."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, SMALL_MODEL, read_metrics, save_teacher, save_tokenizer

SETTINGS = f"{SMALL_MODEL} --eval-iters 0 --exit-interval 2"


@pytest.mark.parametrize("name", ["mor-scratch", pytest.param("mor-average", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on(process_group, corpus, tmp_path, monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(ROOT / "examples" / "science")
    uptraining = importlib.import_module("uptraining")
    dense = save_teacher(
        tmp_path / "dense", num_hidden_layers=8, hidden_size=32, intermediate_size=48, tie_word_embeddings=True
    )
    save_tokenizer(Path(dense), "the of and")
    (tmp_path / "size.yaml").write_text("")

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["uptraining.py", *map(str, words)])
        return uptraining.main()

    runs, plot = tmp_path / "runs", tmp_path / "plot.png"
    data = ["--train-data-path", corpus, "--valid-data-path", corpus]
    given = ["--only", name, "--seeds", 1, "--size", tmp_path / "size.yaml", "--iterations", 4, "--settings", *data]
    settings = SETTINGS.replace(" --split 80,20,0", "").split()
    assert call("plan", "--dense", dense, "--output", runs, *given, *settings) == 0
    assert call("train", runs) == 85
    assert call("report", runs, "--corpus", corpus, "--plot", plot) == 2
    assert call("train", runs) == 0
    assert [line["iteration"] for line in read_metrics(runs / f"{name}-seed1" / "run")] == [1, 2, 3, 4]
    capsys.readouterr()
    assert call("report", runs, "--corpus", corpus, "--plot", plot) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| run", "|---|---|---|---|---|---|---|", f"| {name}"]
    assert plot.exists()
