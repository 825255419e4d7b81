"""--help of every program prints only the help; that of the tools imports no more than torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAMS = sorted(
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    if "add_argument(" in path.read_text() or "parse_config(" in path.read_text()
)  # fmt: skip
# Prints the help of programs, one after another; then, on a line each, the programs that had imported more than torch.
HELP = """
import pathlib, runpy, sys
waited = []
for program in sys.argv[1:]:
    sys.argv, sys.path[0] = [program, "--help"], str(pathlib.Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as done:
        assert done.code == 0, program
    waited += [program] if {"megatron", "deepspeed", "transformers"} & set(sys.modules) else []
print("waited:", *waited, sep="\\n")
"""


def show_help(programs: list[Path]) -> tuple[str, list[str]]:
    """What they print, and those that have imported more than torch when they are done."""
    command = [sys.executable, "-c", HELP, *map(str, programs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    out, _, waited = done.stdout.partition("waited:\n")
    return out, waited.split()


def test_tools_need_no_more_than_torch_to_say_what_they_do():
    tools = [program for program in PROGRAMS if program.parent.name != "benchmarks"]
    assert len(tools) >= 15
    out, waited = show_help(tools)
    assert (out.count("usage: "), waited) == (len(tools), [])


@pytest.mark.slow
def test_benchmarks_say_nothing_else():
    benchmarks = [program for program in PROGRAMS if program.parent.name == "benchmarks"]
    assert len(benchmarks) >= 7
    # Those first that come to Megatron-core first: only its first import could be heard.
    first = sorted(benchmarks, key=lambda path: path.stem not in ("draw_schedule", "parallel"))
    assert show_help(first)[0].count("usage: ") == len(benchmarks)
