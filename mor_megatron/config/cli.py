"""From flags and YAML files to a `Config`, and back to YAML. Types and `--help` come from tyro and the schema.

`parse_config()` is what a program calls; `read_config(argv)` is the same with exceptions instead of an exit.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from mor_megatron.config.megatron_flags import answer
from mor_megatron.config.schema import Config
from mor_megatron.config.settings import COMMAND_LINE, Setting, flag_name, read_command_line, read_files
from mor_megatron.config.validate import validate
from mor_megatron.distributed.launch import launched_world_size
from mor_megatron.files import write_whole
from mor_megatron.planning.report import dry_run

SECTION_OF: dict[str, str] = {
    entry.name: section for section, kind in get_type_hints(Config).items() for entry in fields(kind)
}
"""Field name -> the section of `Config` that holds it."""
TYPE_OF: dict[str, Any] = {
    name: hint for kind in get_type_hints(Config).values() for name, hint in get_type_hints(kind).items()
}
"""Field name -> its type."""
assert len(SECTION_OF) == sum(len(fields(kind)) for kind in get_type_hints(Config).values()), "two fields share a name"

# DeepSpeed's launcher appends --local_rank; the LOCAL_RANK variable, which it also sets, is what we read.
_LAUNCHER_FLAGS = ("local_rank",)


@dataclass(frozen=True)
class _CommandLine:
    """Mixture-of-Recursions on Megatron-core layers and the DeepSpeed engine.

    Every flag can stand in a --config file under the same name; the command line wins.
    """

    config: tuple[str, ...] = ()
    """Flat YAML files; later ones win. `base: other.yaml` in a file reads that one first."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved settings as YAML and exit."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print recursion plan, layout, state of each rank and schedule for WORLD_SIZE ranks (default: as many as one copy
    of the model needs), and exit."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_config(argv: list[str] | None = None) -> Config:
    """The configuration a program was started with; not yet validated (`validate` knows the data-parallel size).

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.
    Returns:
        Defaults, overridden by the YAML files in order, overridden by the flags.
    Raises:
        SystemExit: 2 after one line on stderr when something is wrong; 0 after `--help`, `--print-config` and
            `--dry-run`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        tyro.cli(_CommandLine, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    try:
        config = read_config([word for word in argv if word not in ("--print-config", "--dry-run")])
        shown = None
        if "--print-config" in argv:
            shown = to_yaml(validate(config, launched_world_size() or 1)).rstrip()
        elif "--dry-run" in argv:
            shown = dry_run(config, launched_world_size())
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
    files: list[str] = []
    flags: list[Setting] = []
    for setting in read_command_line(argv):
        if setting.name == "config":
            if not setting.values:
                raise ValueError("--config names no file: give the path of a YAML file")
            files += setting.values
        elif setting.name not in _LAUNCHER_FLAGS:
            flags.append(setting)
    settings = [_positive(setting) for setting in [*read_files(files), *flags]]
    unknown = [_unknown(setting) for setting in settings if setting.name not in TYPE_OF]
    if unknown:
        raise ValueError("; ".join(dict.fromkeys(unknown)))
    return _typed(settings)


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


def _positive(setting: Setting) -> Setting:
    """The setting; `--no-x`, where x is one that can be switched off, as x=false."""
    positive = setting.name.removeprefix("no_")
    is_switch = setting.origin == COMMAND_LINE and setting.values == () and TYPE_OF.get(positive) is bool
    return Setting(positive, ("false",), setting.origin) if is_switch and setting.name not in TYPE_OF else setting


def _unknown(setting: Setting) -> str:
    """What to say of a name that there is not: what replaces Megatron-LM's, or the nearest there is."""
    remedy = answer(setting.name.replace("_", "-"))
    if remedy is None:
        nearest = get_close_matches(setting.name, TYPE_OF, n=1, cutoff=0.5)
        remedy = f"did you mean {flag_name(nearest[0])}?" if nearest else "--help lists all settings"
    return f"unknown setting {flag_name(setting.name)} ({setting.origin}): {remedy}"


def _typed(settings: list[Setting]) -> Config:
    config = _parse(settings)
    if config is not None:
        return config
    # tyro says that something is wrong; the shortest prefix that fails ends with the culprit.
    culprit = settings[bisect_left(range(len(settings)), True, key=lambda i: _parse(settings[: i + 1]) is None)]
    raise ValueError(f"{culprit} has the wrong type: give {_describe(TYPE_OF[culprit.name])}")


def _parse(settings: list[Setting]) -> Config | None:
    """Settings through tyro; None if it refuses them."""
    args: list[str] = []
    for setting in settings:
        words = _words(setting)
        if words is None:
            return None
        args += words
    try:
        # tyro's boxes would break the promise of one line.
        with redirect_stderr(StringIO()):
            return tyro.cli(
                Config, args=args, config=(tyro.conf.OmitArgPrefixes,), console_outputs=False, add_help=False
            )
    except SystemExit:
        return None


def _words(setting: Setting) -> list[str] | None:
    """A setting in tyro's grammar; None if its type shows already that it cannot be."""
    flag, hint = flag_name(setting.name), TYPE_OF[setting.name]
    takes_list = any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))
    if setting.is_list and not takes_list:
        return None
    if hint is bool:
        words = {(): f"--{flag}", ("true",): f"--{flag}", ("false",): f"--no-{flag}"}
        word = words.get(tuple(value.lower() for value in setting.values)) if setting.values is not None else None
        return None if word is None else [word]
    if setting.values is None:
        return [f"--{flag}=None"] if NoneType in get_args(hint) else None
    if not setting.values:
        return [f"--{flag}"]
    # With "=", a value may start with a dash.
    return [f"--{flag}={setting.values[0]}", *setting.values[1:]]


def _describe(hint: Any) -> str:
    """A type in words: `int | None` is `a whole number or None`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("None" if arg is NoneType else _describe(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list (each item {_describe(args[0])})"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "one word or quoted text"}[hint]
