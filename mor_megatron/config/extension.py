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


def load_extension(path: str) -> None:
    """Import the file, once, as a module named by its stem, and add its settings to `schema.RecursionConfig`.

    Raises:
        ValueError: it cannot be read, it raises, its name is another module's, or a setting of it exists already.
    """
    file = Path(path).resolve()
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return
    if known is not None or not file.stem.isidentifier():
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
    taken = {entry.name for section, entry, _ in schema.Config().settings() if section != "recursion"}
    for name in taken.intersection(extended.__dataclass_fields__):
        del sys.modules[file.stem]
        raise ValueError(f"extension={path} defines the setting {flag_name(name)}, which exists: give it another name")
    schema.RecursionConfig = extended
