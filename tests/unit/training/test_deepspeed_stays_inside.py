"""Only one package uses DeepSpeed's private names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
MODES = ROOT / "mor_megatron" / "training" / "modes"
PRIVATE = re.compile(r"deepspeed|ds_[a-z]+|_hp_mapping|[a-z0-9]+_groups_flat\w*|(fp|bf|bit)(16|32)_groups\w*")
"""The door to DeepSpeed's engine, its marks on parameters, and where its optimizers keep what."""


def names(path: Path) -> set[str]:
    """Modules that a file imports, attributes that it reads or sets, and strings that could name one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name for name in found if isinstance(name, str) and PRIVATE.fullmatch(name)}


def test_only_the_modes_know_deepspeeds_insides():
    sources = [path for folder in ("mor_megatron", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert {path: found for path in sources if MODES not in path.parents and (found := names(path))} == {}
    assert names(MODES / "zero3.py") >= {"deepspeed", "ds_shape", "ds_numel", "fp16_groups"}, (
        "the test looks for nothing"
    )
