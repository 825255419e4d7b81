"""What README.md and docs/ name exists: pages and their headings, files, tests, and flags."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from mor_megatron.config.schema import setting_types
from mor_megatron.config.settings import flag_name

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
PLACES = (ROOT, ROOT / "mor_megatron", ROOT / "tests")
"""Paths on a page begin in one of these."""
TAKE_SETTINGS = {"pretrain_mor", "flops", "plan", "isoflops", "uptraining", "import_hf", "launch_slurm"}
"""Programs that take the settings of a run beside their own flags."""
# torchrun, srun and sbatch, ray, lm_eval
ELSEWHERE = """
--nproc-per-node --rdzv-id --ntasks --ntasks-per-node --gpus-per-task --gpu-bind --cpus-per-task --wait --signal
--kill-on-bad-exit --dependency --requeue --array --parsable --nodes --test-only --container-image --container-mounts
--container-workdir --time --head --address
"""
"""Flags of other programs."""
PROGRAM = r"(?:^|\s)((?:(?:tools|benchmarks|examples)/[\w/.-]+|pretrain_mor)\.py)\s(.*)"
"""A program, and the words behind it."""


@cache
def flags_of(program: Path) -> set[str]:
    """The flags in the source of a program, and those that it shares with others."""
    source = program.read_text()
    for shared in ("add_extension", "add_server"):
        if f"{shared}(" in source:
            source += (ROOT / "mor_megatron" / "command.py").read_text()
    found = set(re.findall(r'"(--[a-z][\w-]*)"', source))
    found |= {f"--no-{flag[2:]}" for flag in found} if "BooleanOptionalAction" in source else set()
    return found | settings() if program.stem in TAKE_SETTINGS else found


@cache
def settings() -> set[str]:
    """The flags of a run."""
    names = {flag_name(name) for name in setting_types()} | {"config", "print-config", "dry-run", "help"}
    return {f"--{no}{name}" for name in names for no in ("", "no-")}


def programs() -> list[Path]:
    """All that a page may name."""
    places = ("*.py", "tools/*.py", "benchmarks/*.py", "examples/**/*.py")
    return [path for place in places for path in ROOT.glob(place)]


def commands(text: str) -> list[tuple[Path, list[str]]]:
    """Programs of ours with their flags, from code in blocks and in lines."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in re.split(r"[;|`)]", line):
            if named := re.search(PROGRAM, part):
                found.append((ROOT / named[1], re.findall(r"(?<![\w-])--[a-z][\w-]*", named[2])))
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub names them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    for word in words:
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|sh|md|yaml|sbatch|cpp)", word) and not word.startswith("runs/"):
            assert any((place / word).exists() for place in PLACES), word
        if re.fullmatch(r"test_\w+", word):
            assert any(f"def {word}(" in path.read_text() for path in ROOT.glob("tests/**/test_*.py")), word
    for program, flags in commands(text):
        assert program.exists(), program
        assert set(flags) <= flags_of(program), program.name
    known = set.union(set(ELSEWHERE.split()), settings(), *map(flags_of, programs()))
    assert {word for word in words if re.fullmatch(r"--[a-z][\w-]*", word)} <= known


def test_there_are_commands_and_flags_to_compare():
    assert len(PAGES) >= 17
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60
