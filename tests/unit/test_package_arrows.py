"""Packages import downward only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mor_megatron"
FROM_THE_BOTTOM = (
    "files",
    "recursion",
    "config",
    "command",
    "data",
    "planning",
    "distributed",
    "model",
    "pipeline",
    "training",
    "checkpointing",
    "huggingface",
    "pretraining",
    "inference",
    "serving",
    "evaluation",
    "scaling",
)
"""Packages, and modules of the top level; each may import those before it."""


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names under mor_megatron that a source imports, wherever the import stands, also for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")[: 1 - node.level or None]
            modules = [".".join([*parts, node.module or alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (module.split(".")[1] for module in modules if module.startswith("mor_megatron."))


def test_packages_import_those_below_them():
    upward, known = set(), set()
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        package, names = place.parts[0].removesuffix(".py"), ".".join(["mor_megatron", *place.parts[:-1]])
        if package == "__init__":
            continue
        known.add(package)
        for target in imported(ast.parse(path.read_text()), names):
            if FROM_THE_BOTTOM.index(target) > FROM_THE_BOTTOM.index(package):
                upward.add((str(place), target))
    assert known == set(FROM_THE_BOTTOM)
    assert upward == set()


def test_imports_are_seen_wherever_they_stand():
    source = """
import mor_megatron.data.batch
from mor_megatron.model import build_model
from mor_megatron import files
from ..config import schema
if TYPE_CHECKING:
    from .plan import RecursionPlan
def later():
    from mor_megatron.training.engine import Engine
"""
    found = list(imported(ast.parse(source), "mor_megatron.recursion"))
    assert sorted(found) == ["config", "data", "files", "model", "recursion", "training"]


def at_start(path: Path) -> Iterator[str]:
    """Modules, whole names, that a file imports when it is imported itself."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def everything_at_start(first: Path) -> set[str]:
    """All modules that it brings, through the package's own."""
    known, ahead = set(), [first]
    while ahead:
        for module in at_start(ahead.pop()):
            names = module.split(".")
            for prefix in (".".join(names[: i + 1]) for i in range(len(names))):  # packages are imported, too
                if prefix not in known:
                    known.add(prefix)
                    path = PACKAGE.parent.joinpath(*prefix.split("."))
                    ahead += [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    return known


def test_serving_and_generation_need_no_megatron_and_no_deepspeed():
    for start in ("serving/__init__.py", "serving/http/app.py", "inference/loading.py"):
        found = everything_at_start(PACKAGE / start)
        assert "mor_megatron.huggingface.modeling_mor" in found, "the search finds nothing"
        assert not {"megatron", "deepspeed"} & {module.split(".")[0] for module in found}, start
    assert {"megatron", "deepspeed"} <= everything_at_start(PACKAGE / "pretraining" / "pretrain.py")
