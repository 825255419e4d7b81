"""A user's file of sharing strategies and routing methods: importing it registers them, and their settings.

It is read before any setting is typed, for it may define some (docs/extending.md).
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb

from mor_megatron.config import schema
from mor_megatron.config.settings import flag_name, one_line

_loaded: set[str] = set()
"""Names of the modules that are extensions."""


def load_extension(path: str) -> None:
    """Import the file, once, as a module named by its stem, and add its settings to `schema.RecursionConfig`.

    One of the same name that is loaded already is taken instead: a checkpoint names the place where the file stood when
    it was written.

    Raises:
        ValueError: it cannot be read, it raises, its name is another module's, or a setting of it exists already.
    """
    file = Path(path).resolve()
    if file.stem in sys.modules and file.stem in _loaded:
        return
    if file.stem in sys.modules or not file.stem.isidentifier():
        raise ValueError(f"extension={path} cannot be the module {file.stem}: give the file another name")
    spec = spec_from_file_location(file.stem, file)
    if spec is None:
        raise ValueError(f"extension={path} is not a Python file: give one whose name ends in .py")
    module = sys.modules[file.stem] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        extended = schema.recursion_config()
    except Exception as error:
        del sys.modules[file.stem]
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f"{path}:{lines[-1]}" if lines else path
        reason = one_line(str(error)) or "no reason given"
        raise ValueError(
            f"extension={place} cannot be loaded ({type(error).__name__}: {reason}): give a Python file that imports "
            "without errors"
        ) from error
    for name in _redefined(extended):
        del sys.modules[file.stem]
        raise ValueError(f"extension={path} defines the setting {flag_name(name)}, which exists: give it another name")
    schema.RecursionConfig = extended
    _loaded.add(file.stem)


def _redefined(extended: type[schema.SharingConfig]) -> list[str]:
    """Settings of the extended section that another section has, or that it had before with another meaning."""
    before, now = schema.RecursionConfig.__dataclass_fields__, extended.__dataclass_fields__
    others = {entry.name for section, entry, _ in schema.Config().settings() if section != "recursion"}
    changed = {name for name in before if now[name] is not before[name]} - {"sharing_strategy", "routing"}
    return sorted(others & set(now) | changed)
