"""tools/plan.py: what it prints, and its refusals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
SPEC = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)
MODEL = ("--config", CONFIGS / "mor_expert_nr3.yaml", CONFIGS / "360m.yaml")


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run the tool: exit status, standard output and error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        return TOOL.main(), *capsys.readouterr()

    return run


def test_layouts_of_a_preset(plan):
    status, out, err = plan(
        *MODEL, "--gpus", 16, "--memory", "40GB", "--machine", "A100", "--zero-stage", 1, "--top", 3
    )
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "16 x A100, 36 of 40 GB for tensors; global batch 1024 x 2048 tokens, bf16"
    rows = [line.split() for line in lines[4:7]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(float(row[-11].rstrip("%")) <= 36 for row in rows)
    assert "--zero-stage 1" in lines[9]
    recomputations = [line.split()[0] for line in lines[-4:]]
    assert recomputations == ["none", "selective", "layer", "recursion"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --config and --gpus say what to plan for"),
        (MODEL, "error: --config and --gpus say what to plan for"),
        ((*MODEL, "--gpus", 0), "error: gpus=0 must be at least 1"),
        ((*MODEL, "--gpus", 8, "--memory", "80"), "error: memory=80 is not a size: use one such as 80GB"),
        ((*MODEL, "--gpus", 8, "--memory", "2GB"), "error: memory=2GB leaves nothing beside reserved-gb=4"),
        ((*MODEL, "--gpus", 8, "--machine", "H1"), "error: machine=H1 is neither known nor a file"),
        ((*MODEL, "--gpus", 8, "--hiden-size", "3"), "error: unknown setting hiden-size"),
        (
            ("--config", CONFIGS / "tiny.yaml", "--gpus", 8, "--vocab-size", 100, "--global-batch-size"),
            "global-batch-size",
        ),
    ],
)
def test_one_line_of_what_is_wrong(plan, arguments, message):
    status, _, err = plan(*arguments)
    assert status == 2
    assert message in err.splitlines()[-1]
