"""The code of a model, written beside its weights: a directory that needs nothing but torch and transformers.

transformers copies files that import each other as `from .name import ..`, and no packages. So the files of
`mor_megatron.recursion` lie beside the others, and only the prefix of their imports is changed. This file
travels with an exported model.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

CORE = "mor_megatron.recursion."
FIRST, EXTENSIONS = "modeling_mor", "extensions_mor"
_IMPORT = re.compile(rf"^from (\.|{re.escape(CORE)})(\w+) import", re.MULTILINE)


def write_code(directory: str | Path, *needed: Any) -> None:
    """Write the files that define a model.

    Args:
        directory: of the weights; it is there.
        needed: a routing method and a sharing strategy; the file of one that is not built in is written as well.
    Raises:
        ValueError: such a file imports something that does not travel, or has the name of another.
        OSError: a file cannot be written.
    """
    sources: dict[str, str] = {}
    files = _collect(Path(__file__).with_name(f"{FIRST}.py"), sources)
    further = []
    for thing in needed:
        path = Path(sys.modules[thing.__module__].__file__)
        if path in files:
            continue
        if path.stem in sources:
            raise ValueError(f"{path} has the name of a file of every export: rename it")
        further.append(path.stem)
        files |= _collect(path, sources)
        _check(path, sources[path.stem])
    if further:
        lines = [f"from .{name} import __name__ as _{number}" for number, name in enumerate(further)]
        text = f'"""Extensions that this model needs."""\n\n{chr(10).join(lines)}\n\nNAMES = {tuple(further)!r}\n'
        sources[EXTENSIONS] = text
    for name, text in sources.items():
        (Path(directory) / f"{name}.py").write_text(text, encoding="utf-8")


def _collect(path: Path, sources: dict[str, str]) -> set[Path]:
    """Add a file and those that it imports to `sources`: module name -> text, with flat imports. Which these were."""
    text, files = path.read_text(encoding="utf-8"), {path}
    sources[path.stem] = text.replace(f"from {CORE}", "from .")
    for package, name in _IMPORT.findall(text):
        if name not in sources:
            folder = path.parent if package == "." else Path(sys.modules[f"{CORE}{name}"].__file__).parent
            files |= _collect(folder / f"{name}.py", sources)
    return files


def _check(path: Path, text: str) -> None:
    found = re.search(r"^\s*(?:from|import) (mor_megatron\S*)", text, re.MULTILINE)
    if found is not None:
        raise ValueError(f"{path} imports {found[1]}: of mor_megatron, an extension may import {CORE}* only")


__all__ = ["write_code"]
