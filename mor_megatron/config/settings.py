"""Settings as text, each with the place it was written at: YAML files and command lines before any typing.

Both sources are brought into one form here, so that `coerce.py` types them alike and names their origin in errors.
What a setting means is not known in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

COMMAND_LINE = "command line"
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Setting:
    """One setting as it was written."""

    name: str
    """Field name, with underscores."""
    values: tuple[str, ...] | None
    """Its words; None for YAML's null, () for a flag without a value."""
    origin: str
    """`file.yaml:3` or `command line`."""
    is_list: bool = False
    """Written as a YAML list, whatever its length."""

    def __str__(self) -> str:
        """The way errors show it: `num-layers=12 (tiny.yaml:3)`."""
        if self.values is None:
            text = "null"
        elif len(self.values) == 1 and not self.is_list:
            text = self.values[0]
        else:
            text = f"[{', '.join(self.values)}]"
        return f"{flag_name(self.name)}={one_line(text)} ({self.origin})"


def flag_name(name: str) -> str:
    """`num_layers` as users write it: `num-layers`."""
    return one_line(name.replace("_", "-"))


def one_line(text: str) -> str:
    """Text from outside as errors show it: control characters escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def read_command_line(argv: Sequence[str]) -> list[Setting]:
    """Split `--name value ...`, `--name=value` and bare `--name` into settings, in order.

    A word that starts with `--` opens a setting; the words after it are its values. `-1` is a value.

    Raises:
        ValueError: a word stands before the first `--name`.
    """
    settings: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            settings.append((name, [value] if equals else []))
        elif settings:
            settings[-1][1].append(word)
        else:
            raise ValueError(f"unexpected {word!r} on the {COMMAND_LINE}: write settings as --name value")
    return [Setting(name.replace("-", "_"), tuple(values), COMMAND_LINE) for name, values in settings]


def read_yaml(path: str | Path, _open_files: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a flat YAML file, those of its `base` file or files first, so that its own win.

    `base` paths are relative to the file that names them. Scalars stay text: their types come from the schema, not
    from YAML's guesses (3e-3 is text to YAML 1.1, and `on` a boolean).

    Raises:
        ValueError: unreadable file, invalid YAML, a key given twice, a nested value, or a file that is its own base.
    """
    path = Path(path)
    if path.resolve() in _open_files:
        raise ValueError(f"config={path}: the file is its own base; remove it from `base`")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"config={path} cannot be read ({error.strerror}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config={path} is not UTF-8 text: give the path of a YAML file") from error
    except RecursionError as error:
        raise ValueError(f"config={path} is nested too deeply: write one `name: value` a line") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"config={place} is not valid YAML ({problem}): write one `name: value` a line") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"config={path} is not a mapping: write one `name: value` a line")

    own: dict[str, Setting] = {}
    for key, value in root.value:
        setting = _setting(key, value, path)
        if setting.name in own:
            first = own[setting.name].origin
            raise ValueError(f"{setting} repeats the key of {first}: keep one of them")
        own[setting.name] = setting
    bases = own.pop("base", None)
    inherited: list[Setting] = []
    for base in (bases.values or ()) if bases else ():
        inherited += read_yaml(path.parent / base, (*_open_files, path.resolve()))
    return [*inherited, *own.values()]


def read_files(paths: Iterable[str | Path]) -> list[Setting]:
    """Settings of several YAML files; later files come later.

    Raises:
        ValueError: see `read_yaml`.
    """
    return [setting for path in paths for setting in read_yaml(path)]


def _setting(key: yaml.Node, value: yaml.Node, path: Path) -> Setting:
    origin = f"{path}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode):
        raise ValueError(f"config={origin}: a key is not a name; write `name: value`")
    name = key.value.replace("-", "_")
    if isinstance(value, yaml.ScalarNode):
        return Setting(name, None if value.tag == _NULL else (value.value,), origin)
    if isinstance(value, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in value.value):
        if any(item.tag == _NULL for item in value.value):
            raise ValueError(f"{flag_name(name)} ({origin}) has an item without a value: give it one, or leave it out")
        return Setting(name, tuple(item.value for item in value.value), origin, is_list=True)
    raise ValueError(f"{flag_name(name)} ({origin}) has a nested value: settings are flat, `name: value`")
