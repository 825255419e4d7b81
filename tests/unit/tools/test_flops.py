"""tools/flops.py: its output and its refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"


def flops(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "flops.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)


def test_published_iterations():
    done = flops("--budget", "16.5e18")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[-2:] for line in done.stdout.splitlines()[1:]}
    assert rows == {
        "vanilla": ["9438", "9438"],
        "recursive_nr4": ["8883", "8883"],
        "mor_expert_nr2": ["12619", "12619"],
        "mor_expert_nr3": ["14160", "14161"],
        "mor_expert_nr4": ["14216", "14216"],
        "mor_expert_nr3_kv_sharing": ["14672", "14672"],
    }


def test_one_model_beside_the_unrolled_one():
    files = (CONFIGS / "mor_expert_nr3.yaml", CONFIGS / "360m.yaml")
    done = flops("--config", *files, "--recompute-granularity", "full", "--budget", "16.5e18", "--fractions", 1, 0.5, 0)
    assert done.returncode == 0, done.stderr
    assert "routing expert_choice, tokens at each recursion 1 0.5 0, sequences of 2048" in done.stdout
    rows = {line[:46].strip(): line[46:].split() for line in done.stdout.splitlines()[3:]}
    assert rows["unique parameters"][:2] == ["165,177,600", "361,821,120"]
    assert rows["iterations for 1.65e+19 of the paper's FLOPs"][:2] == ["14,160", "9,438"]
    assert rows["bytes of keys and values a token, 16 bits"] == ["21,760", "40,960", "0.531"]
    model, hardware = (
        [float(word.replace(",", "")) for word in rows[f"training, {kind}"]]
        for kind in ("model FLOPs a token (MFU)", "hardware FLOPs a token (HFU)")
    )
    assert all(1.2 < h / m < 4 / 3 for h, m in zip(hardware[:2], model[:2], strict=True)), "the layers, not the head"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --config names no file"),
        (("--budget", "0"), "error: budget=0.0 must be above 0"),
        (("--budget", "1e18", "--num-layers", "4"), "error: --config names no file"),
        (("--config", "missing.yaml"), "error: config=missing.yaml cannot be read"),
        (("--config", CONFIGS / "tiny.yaml"), "error: vocab-size is not set"),
        (("--config", CONFIGS / "360m.yaml", "--fractions", "1", "0.5"), "must be as many as num-recursions=1"),
    ],
)
def test_one_line_of_what_is_wrong(arguments, message):
    done = flops(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
