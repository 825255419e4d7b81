"""From the words of a setting to a value of its type: bool, int, float, str, Literal, tuple[X, ...] and X | None."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mor_megatron.config.settings import Setting


def coerce(setting: Setting, hint: Any) -> Any:
    """The value of a setting.

    Args:
        setting: as written.
        hint: the type of its field.
    Raises:
        ValueError: it is not of this type; names the setting, where it stands, and the type in words.
    """
    try:
        return _value(hint, setting.values, setting.is_list)
    except (ValueError, KeyError):
        raise ValueError(f"{setting} has the wrong type: give {_describe(hint)}") from None


def _value(hint: Any, words: tuple[str, ...] | None, is_list: bool) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (kind,) = (arg for arg in get_args(hint) if arg is not NoneType)
        return None if words in (None, ("None",)) else _value(kind, words, is_list)
    if words is None:
        raise ValueError
    if get_origin(hint) is tuple:
        return tuple(_item(get_args(hint)[0], word) for word in words)
    if hint is bool and words == () and not is_list:
        return True
    if len(words) != 1 or is_list:
        raise ValueError
    return _item(hint, words[0])


def _item(kind: Any, word: str) -> Any:
    if get_origin(kind) is Literal:
        return {str(value): value for value in get_args(kind)}[word]
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    return kind(word)


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
