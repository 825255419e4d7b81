"""The file that --calibrate writes is one that the planner reads."""

from __future__ import annotations

from mor_megatron.planning.machines import MACHINES, load_machine
from mor_megatron.pretraining import calibration


def test_what_is_measured_is_what_the_planner_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibration, "_seconds", lambda work: 1e-3)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    file = tmp_path / "here.yaml"
    calibration.calibrate(file)
    machine = load_machine(str(file))
    flops = sum(6 * (a // 4) * (b // 4) * (c // 4) for a, b, c in calibration.SHAPES) / 3
    assert machine.fp32_tflops == machine.bf16_tflops == round(flops / 1e-3 / 1e12, 4)
    assert machine.copy_gbs == round(2 * 4 * 2**25 / 1e-3 / 1e9, 2)
    assert (machine.is_cuda, machine.network_gbs) == (False, MACHINES["CPU"].network_gbs), "not measured"
    assert f"fp32-tflops: {machine.fp32_tflops}" in capsys.readouterr().out
