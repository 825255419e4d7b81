"""The directory of a run's checkpoints: their names, which one to resume from, which ones to delete.

```
DIR/latest                 name of the newest checkpoint
DIR/iter_0000010/          a checkpoint; it gets this name when it is complete
DIR/iter_0000020.partial/  one that is being written, or was never finished
DIR/iter_0000010.replaced/ an older one, while another of the same iteration takes its name
```
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mor_megatron.checkpointing.manifest import MANIFEST, damage, read_manifest
from mor_megatron.files import flush, flush_directory

LATEST = "latest"
PARTIAL, REPLACED = ".partial", ".replaced"
_NAME = re.compile(r"iter_(\d{7,})(\.replaced)?")


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def candidates(root: Path) -> list[Path]:
    """Checkpoints to resume from, best first: the one that `latest` names, then older ones from new to old.

    Without a usable `latest`, all of them from new to old. They may be damaged.
    """
    found = _found(root)
    try:
        named = _NAME.fullmatch((root / LATEST).read_text().strip())
    except (OSError, UnicodeDecodeError):
        named = None
    if named is not None and found:
        newest = int(named[1])
        older = [path for iteration, path in found if iteration <= newest]
        missing = [] if any(path.name == named[0] for path in older) else [root / named[0]]
        return [*missing, *older]
    return checkpoints(root)


def checkpoints(root: Path) -> list[Path]:
    """All of them from new to old, also those that are newer than `latest`."""
    return [path for _, path in _found(root)]


def publish(partial: Path) -> Path:
    """Give a complete checkpoint its name, then point `latest` to it; every step is on the disk before the next.

    Killed at any instant, it leaves the old checkpoint of that name or the new one where `candidates` finds it.

    Raises:
        OSError: the directory cannot be changed.
    """
    root, final = partial.parent, partial.with_suffix("")
    replaced = final.with_name(final.name + REPLACED)
    flush_directory(partial)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    partial.rename(final)
    flush_directory(root)
    pointer = root / f"{LATEST}{PARTIAL}"
    with pointer.open("w") as file:
        file.write(final.name + "\n")
        flush(file)
    os.replace(pointer, root / LATEST)
    flush_directory(root)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def expired(root: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Checkpoints that retention does not keep, and what unfinished saves left behind.

    Of those up to the one that `latest` names, the `keep_last` newest complete ones stay, and all whose iteration is
    a multiple of `keep_every`. Incomplete ones (no manifest, a file missing or of another size) expire.
    """
    newest = next(iter(candidates(root)), None)
    if newest is None:
        return []
    limit = iteration_of(newest)
    found, kept = [], 0
    for iteration, path in _found(root):
        if iteration > limit:  # written before the run went back to an older checkpoint
            continue
        if not _complete(path):
            found.append(path)
        elif kept < keep_last:
            kept += 1
        elif keep_every is None or iteration % keep_every:
            found.append(path)
    # A later one may be what a run is writing at this moment.
    remains = [path for path in root.glob(f"iter_*{PARTIAL}") if path.name <= f"{checkpoint_name(limit)}{PARTIAL}"]
    return found + sorted(remains)


def delete(paths: list[Path]) -> None:
    """Delete checkpoints, the manifest first, so that one half deleted is no checkpoint.

    Raises:
        OSError: no rights.
    """
    for path in paths:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _found(root: Path) -> list[tuple[int, Path]]:
    """Iterations and directories under a checkpoint's name, from new to old; a replaced one after its successor."""
    names = [_NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    matches = sorted((match for match in names if match), key=lambda m: (-int(m[1]), m[2] is not None))
    return [(int(match[1]), root / match[0]) for match in matches]


def iteration_of(path: Path) -> int:
    """Of a checkpoint under its own name, or replaced."""
    return int(_NAME.fullmatch(path.name)[1])


def _complete(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
    except ValueError:
        return False
    return damage(path, manifest, list(manifest.files), contents=False) is None
