"""Optional GPU libraries whose install is broken: set aside and reported, so that a run goes on without them.

Megatron-core imports Transformer Engine and flash-attn where it finds them, and takes an ImportError for an absent
library. A broken install (built for another CUDA or PyTorch, a missing shared object) may raise anything, OSError for
one, and would end every program that imports Megatron-core. Nothing here imports Megatron-core.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

NAMES = {"transformer_engine": "Transformer Engine", "flash_attn": "flash-attn"}
"""Package -> the name that users know."""
_MODULES = {"transformer_engine": "transformer_engine.pytorch", "flash_attn": "flash_attn"}
_broken: dict[str, str] = {}


def set_broken_aside() -> None:
    """Make every later import of a broken library an ImportError; call it before Megatron-core is imported."""
    for package in NAMES:
        if package not in sys.modules and find_spec(package) is not None:
            why_not(package)


def why_not(package: str) -> str | None:
    """Why a library, a key of `NAMES`, cannot be imported, in one line; None if it can.

    The first to ask about a broken one sets it aside, and rank 0 reports it.
    """
    if package in _broken:
        return _broken[package]
    try:
        import_module(_MODULES[package])
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        is_absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
        if not is_absent:
            _set_aside(package, reason)
        return reason
    return None


def _set_aside(package: str, reason: str) -> None:
    _broken[package] = reason
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # Python's own mark of a module that must not be imported
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {NAMES[package]} is installed but broken ({reason}): it is not used", file=sys.stderr)
