"""tools/gpu_check.py without a GPU: every stage runs on the CPU, and a number that disagrees makes it fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import run_program

from mor_megatron.config.cli import read_config
from mor_megatron.config.validate import validate

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)


def check(tmp_path: Path, *stages: str) -> dict:
    """The JSON of a quick run on the CPU that found nothing wrong."""
    output = tmp_path / "check.json"
    words = ["--device", "cpu", "--quick", "--json", output, "--stages", *stages]
    status, printed = run_program("tools/gpu_check.py", words, tmp_path)
    assert status == 0, printed
    assert "all agree" in printed
    return json.loads(output.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it would run where there is no GPU")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path):
    status, printed = run_program("tools/gpu_check.py", ["--json", tmp_path / "check.json"], tmp_path)
    assert status == 0, printed
    for stage in gpu_check.STAGES:
        assert f"\n{stage} " in printed
    assert "tp2-sp-pp2" in printed
    assert "1.7b mor_expert_nr3" in printed
    assert not (tmp_path / "check.json").exists()


def test_kernels_on_the_cpu(tmp_path):
    results = check(tmp_path, "kernels")
    assert {"date", "device", "torch", "megatron-core", "deepspeed"} <= results["machine"].keys()
    measured = [row for row in results["kernels"] if "skipped" not in row]
    assert len(measured) == 3
    assert all(0 < row["difference"] < row["limit"] for row in measured)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_other_stages_on_the_cpu(tmp_path):
    results = check(tmp_path, "reference", "layouts", "curves", "throughput")
    (row,) = results["reference"]
    assert (row["passed"], row["failed tests"]) == (6, 0)
    assert [row["layout"] for row in results["layouts"]] == ["one", "dp2", "pp2"]
    assert all(row["largest difference"] < row["limit"] for row in results["layouts"])
    assert all(len(row["losses"]) == 4 and row["last loss"] < row["first loss"] for row in results["curves"])
    (row,) = results["throughput"]
    assert row["tokens_per_second"] > 0
    assert row["tflops_per_gpu"] == pytest.approx(row["utilisation"] * row["peak_tflops"], rel=0.5)
    assert "communication: gloo" in row["using"]


def test_every_size_is_a_valid_run():
    plan = gpu_check.Plan("cuda", 8, quick=False)
    for size, variant, micro_batch in plan.sizes:
        config = validate(read_config(gpu_check.settings_of(plan, size, variant, micro_batch)), plan.ranks)
        assert config.training.bf16
        assert config.model.num_layers >= 23


def test_curves_are_compared_where_they_begin_and_end():
    expected = [4.8 - 0.02 * i for i in range(100)]
    assert not gpu_check.compare_curves(expected, expected)["failed"]
    assert not gpu_check.compare_curves([loss * 1.001 for loss in expected], expected)["failed"]
    assert gpu_check.compare_curves([4.9, *expected[1:]], expected)["failed"], "another first loss"
    assert gpu_check.compare_curves([max(loss, 3.2) for loss in expected], expected)["failed"], "learns less"
    assert gpu_check.compare_curves([*expected[:99], float("nan")], expected)["failed"]


@pytest.mark.parametrize(
    "stage",
    [
        lambda plan: [{"largest difference": 1.0, "failed": True}],
        lambda plan: gpu_check.run_job(plan, "layout", {"name": "one"}),
    ],
    ids=["a disagreement", "a process that fails"],
)
def test_what_fails_turns_it_red(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.setitem(gpu_check.STAGES, "layouts", stage)
    monkeypatch.setattr(gpu_check, "JOBS", tmp_path / "nowhere.py")
    output = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--quick", "--stages", "layouts", "--json", str(output)]) == 1
    assert "DISAGREES: layouts" in capsys.readouterr().out
    assert json.loads(output.read_text())["layouts"][0]["failed"]


def test_micro_batches_are_halved_until_they_fit(monkeypatch):
    plan, tried = gpu_check.Plan("cuda", 2, quick=False), []

    def small_card(plan, job, arguments, ranks):
        micro_batch = read_config(arguments["settings"]).training.micro_batch_size
        tried.append(micro_batch)
        if micro_batch > 4 or "1.7b" in arguments["size"]:
            raise MemoryError
        return [{"size": arguments["size"], "micro-batch": micro_batch}]

    monkeypatch.setattr(gpu_check, "run_job", small_card)
    rows = gpu_check.throughput(plan)
    assert tried[:3] == [16, 8, 4]
    assert rows[0] == {"size": "135m", "micro-batch": 4}
    assert "does not fit" in rows[-1]["skipped"]
    assert len(rows) == len(plan.sizes)
