"""tools/gpu_check.py without a GPU: every stage runs in small on the CPU; what disagrees, fails or hangs is told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import run_program

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))  # after the benchmarks, which have files of the same names

gpu_check = importlib.import_module("gpu_check")
numbers = importlib.import_module("gpu_check_numbers")
speed = importlib.import_module("gpu_check_speed")

SOON = [name for name in gpu_check.STAGES if name not in ("medium", "tiny", "layouts")]
"""Two stages differ from `large` by a preset only on the CPU; `layouts` starts processes."""


def check(tmp_path: Path, stages: list[str], budget: int) -> dict:
    """The JSON of a small run on the CPU that found nothing wrong."""
    words = ["--device", "cpu", "--budget", budget, "--json", tmp_path / "check.json", "--stages", *stages]
    status, printed = run_program("tools/gpu_check.py", words, tmp_path)
    assert status == 0, printed
    assert "all agree" in printed
    return json.loads((tmp_path / "check.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it would run where there is no GPU")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path):
    status, printed = run_program("tools/gpu_check.py", ["--json", tmp_path / "check.json"], tmp_path)
    assert status == 0, printed
    for stage in gpu_check.STAGES:
        assert f"\n{stage} " in printed
    assert not (tmp_path / "check.json").exists()


def test_every_stage_on_the_cpu(tmp_path):
    # A busy machine takes several times the estimates, and no stage may be skipped for that here.
    found = check(tmp_path, SOON, budget=600)
    assert {"date", "device", "torch", "megatron-core", "deepspeed"} <= found["machine"].keys()
    assert all(found[stage] for stage in SOON)
    assert all("skipped" not in row for stage in SOON for row in found[stage])
    assert all(0 <= row["gradient difference"] < 1e-5 for row in found["gradients"])
    (case,) = found["reference"]
    assert (case["tests"], case["failed tests"]) == (6, 0)
    vanilla, routed = found["large"]
    assert vanilla["time ratio"] == vanilla["FLOPs ratio"] == 1.0 > routed["FLOPs ratio"] > 0.6
    shares = [routed[kind] for kind in ("attention", "products", "optimizer", "copies", "element-wise")]
    assert sum(shares) == pytest.approx(1.0)
    assert all(row["ms/token"] > 0 for row in found["decoding"])


@pytest.mark.slow
def test_the_other_stages_on_the_cpu(tmp_path):
    found = check(tmp_path, ["medium", "tiny", "layouts"], budget=600)
    assert [row["layout"] for row in found["layouts"]] == ["dp2"]


def test_a_sketch_knows_the_norm_of_a_difference():
    expected = numbers.summary("expert", numbers.walk(1), bf16=False)
    other = numbers.summary("expert", replace(numbers.walk(1), document_ids=torch.zeros(4, 320).long()), bf16=False)
    assert not numbers.compare(other, expected, 1e-4)["failed"], "one document is none"
    apart = numbers.summary("expert", numbers.with_documents(numbers.walk(1)), bf16=False)
    row = numbers.compare(apart, expected, numbers.BF16_TOL)
    assert row["failed"]
    assert row["gradient difference"] > 0.1


def test_curves_are_compared_where_they_begin_and_end():
    expected = [4.8 - 0.02 * i for i in range(100)]
    assert not numbers.compare_curves(expected, expected)["failed"]
    assert not numbers.compare_curves([loss * 1.001 for loss in expected], expected)["failed"]
    assert numbers.compare_curves([4.9, *expected[1:]], expected)["failed"], "another first loss"
    assert numbers.compare_curves([max(loss, 3.2) for loss in expected], expected)["failed"], "learns less"
    assert numbers.compare_curves([*expected[:99], float("nan")], expected)["failed"]


def test_every_size_is_a_valid_run():
    run = gpu_check.Run("cuda", 0.0)
    for size in ("135m", "360m", "1.7b"):
        for variant in ("vanilla", "mor_expert_nr2", "mor_expert_nr3", "mor_expert_nr3_kv_sharing", "mor_token_nr3"):
            config = speed.settings(run, size, variant, 4)
            assert config.training.bf16
            assert config.model.num_layers >= 23


def test_kernels_are_told_apart_by_their_names():
    assert speed.kind_of("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT") == "products"
    assert speed.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3") == "attention"
    assert speed.kind_of("void at::native::multi_tensor_apply_kernel<...FusedAdam...>") == "optimizer"
    assert speed.kind_of("Memcpy DtoD (Device -> Device)") == "copies"
    assert speed.kind_of("void at::native::vectorized_elementwise_kernel<4, ...>") == "element-wise"


def fails(run):
    yield {"what": "one row"}
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs(run):
    time.sleep(1.0)
    yield {"what": "late"}


@pytest.mark.parametrize(("stage", "said"), [(fails, "illegal memory"), (hangs, "hangs after")])
def test_what_fails_or_hangs_is_written_and_the_rest_starts_anew(tmp_path, monkeypatch, stage, said):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", -11.7)  # 0.3 s after three times the estimate
    monkeypatch.setattr(gpu_check.Stage, "rows", lambda self, run: stage(run))
    results, restarts = gpu_check.Results(tmp_path / "check.json", {}), []
    run = gpu_check.Run("cpu", time.monotonic() + 100)
    gpu_check.run_stage("syncs", run, results, lambda: restarts.append(1))
    assert restarts == [1]
    written = json.loads((tmp_path / "check.json").read_text())["syncs"]
    (row,) = [row for row in written if row.get("failed")]
    assert said in row["output"]
    assert results.failed == ["syncs"]


def test_a_stage_that_does_not_fit_is_skipped(tmp_path):
    results = gpu_check.Results(tmp_path / "check.json", {})
    gpu_check.run_stage("large", gpu_check.Run("cuda", time.monotonic() + 3), results, lambda: None)
    assert "3 s left" in results.found["large"][0]["skipped"]
    assert not results.failed


def test_a_restarted_check_keeps_what_it_found(tmp_path):
    path = tmp_path / "check.json"
    path.write_text(json.dumps({"machine": {}, "large": [{"failed": True}]}))
    words = ["--device", "cpu", "--budget", 0, "--json", path, "--resume", "--stages", "curves"]
    status, printed = run_program("tools/gpu_check.py", words, tmp_path / "logs")
    assert status == 1
    assert "DISAGREES: large" in printed
    assert "0 s left" in json.loads(path.read_text())["curves"][0]["skipped"]


@pytest.mark.slow
def test_the_wheels_of_a_bare_machine_can_be_packed(tmp_path):
    subprocess.run([ROOT / "tools" / "pack_gpu_check.sh", tmp_path], check=True)
    wheels = list(tmp_path.glob("*.whl"))
    assert {"megatron_core", "deepspeed", "tyro", "pydantic"} <= {wheel.name.split("-")[0] for wheel in wheels}
    assert sum(wheel.stat().st_size for wheel in wheels) < 20 * 2**20
