"""From flags and YAML files to a `Config`, and back to YAML.

`parse_config()` is what a program calls; `read_config(argv)` is the same with exceptions instead of an exit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from mor_megatron.config.coerce import coerce
from mor_megatron.config.extension import load_extension
from mor_megatron.config.megatron_flags import answer
from mor_megatron.config.schema import Config, setting_types
from mor_megatron.config.settings import COMMAND_LINE, Setting, flag_name, read_command_line, read_files
from mor_megatron.config.validate import validate
from mor_megatron.files import write_whole

# DeepSpeed's launcher appends --local_rank; the LOCAL_RANK variable, which it also sets, is what we read.
_LAUNCHER_FLAGS = ("local_rank",)
_SHOWING = ("-h", "--help", "--print-config", "--dry-run")


def parse_config(
    argv: list[str] | None = None,
    world_size: Callable[[], int | None] = lambda: None,
    dry_run: Callable[[Config, int | None], str] | None = None,
) -> Config:
    """The configuration a program was started with; not yet validated (`validate` knows the data-parallel size).

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.
        world_size: ranks of the run, None if nobody has said how many; asked only if something is to be printed.
        dry_run: what `--dry-run` prints, from the configuration as parsed and the number of ranks.
    Returns:
        Defaults, overridden by the YAML files in order, overridden by the flags.
    Raises:
        SystemExit: 2 after one line on stderr when something is wrong; 0 after `--help`, `--print-config` and
            `--dry-run`.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = [word for word in argv if word not in _SHOWING]
    try:
        if "-h" in argv or "--help" in argv:
            from mor_megatron.config.help_text import exit_with_help  # imports tyro, which nothing else needs

            _read(settings)
            exit_with_help()
        config = read_config(settings)
        shown = None
        if "--print-config" in argv:
            shown = to_yaml(validate(config, world_size() or 1)).rstrip()
        elif "--dry-run" in argv:
            if dry_run is None:
                raise ValueError("--dry-run is pretrain_mor.py's: leave it out")
            shown = dry_run(config, world_size())
        if shown is None:
            return config
        if _speaks():
            print(shown)
        sys.exit(0)
    except ValueError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read_config(argv: Sequence[str]) -> Config:
    """Like `parse_config`, for flags and `--config` only.

    Raises:
        ValueError: unknown names (all of them, each with what to write), a wrong type, an unreadable or malformed file.
            Every message names the setting and the file and line, or the command line, where it stands.
    """
    settings = _read(argv)
    types = setting_types()
    settings = [_positive(setting, types) for setting in settings]
    unknown = [_unknown(setting, types) for setting in settings if setting.name not in types]
    if unknown:
        raise ValueError("; ".join(dict.fromkeys(unknown)))
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, hint = types[setting.name]
        values.setdefault(section, {})[setting.name] = coerce(setting, hint)
    config = Config()
    return replace(config, **{section: replace(getattr(config, section), **own) for section, own in values.items()})


def _read(argv: Sequence[str]) -> list[Setting]:
    """Every setting as written, those that win last; loads the `extension` that they name, which may define some.

    Raises:
        ValueError: see `read_config`.
    """
    files: list[str] = []
    flags: list[Setting] = []
    for setting in read_command_line(argv):
        if setting.name == "config":
            if not setting.values:
                raise ValueError("--config names no file: give the path of a YAML file")
            files += setting.values
        elif setting.name not in _LAUNCHER_FLAGS:
            flags.append(setting)
    settings = [*read_files(files), *flags]
    extensions = [coerce(setting, str | None) for setting in settings if setting.name == "extension"]
    if extensions and extensions[-1] is not None:
        load_extension(extensions[-1])
    return settings


def to_yaml(config: Config) -> str:
    """Every setting as flat YAML, one comment line per section. `--config` reads it back to an equal `Config`."""
    blocks = []
    for section in fields(config):
        part = getattr(config, section.name)
        values = {flag_name(entry.name): getattr(part, entry.name) for entry in fields(part)}
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=sys.maxsize)
        blocks.append(f"# {section.name}\n{text}")
    return "\n".join(blocks)


def save_config(config: Config, path: str | Path) -> None:
    """Write `to_yaml(config)` to a file, whole or not at all.

    Raises:
        OSError: the directory is missing or not writable.
    """
    write_whole(path, to_yaml(config))


class _Dumper(yaml.SafeDumper):
    """YAML with one setting a line: tuples as [a, b]."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _speaks() -> bool:
    # All ranks read the same settings; one voice per node is enough.
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _positive(setting: Setting, types: dict[str, tuple[str, Any]]) -> Setting:
    """The setting; `--no-x`, where x is one that can be switched off, as x=false."""
    _, hint = types.get(setting.name.removeprefix("no_"), (None, None))
    is_negated = setting.name not in types and setting.origin == COMMAND_LINE and setting.values == () and hint is bool
    return Setting(setting.name.removeprefix("no_"), ("false",), setting.origin) if is_negated else setting


def _unknown(setting: Setting, types: dict[str, tuple[str, Any]]) -> str:
    """What to say of a name that there is not: what replaces Megatron-LM's, or the nearest there is."""
    remedy = answer(setting.name.replace("_", "-"))
    if remedy is None:
        nearest = get_close_matches(setting.name, types, n=1, cutoff=0.5)
        remedy = f"did you mean {flag_name(nearest[0])}?" if nearest else "--help lists all settings"
    return f"unknown setting {flag_name(setting.name)} ({setting.origin}): {remedy}"
