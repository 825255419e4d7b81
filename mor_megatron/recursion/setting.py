"""A setting beyond its type and default: which values it may have, when it is read, what a change of it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints


class Change(Enum):
    """What it means that a run has another value of a setting than the checkpoint that it loads."""

    WEIGHTS = "the stored weights are those of another model"
    FUNCTION = "the same weights would compute something else: fine-tuning may, a resumed run may not"
    STATE = "the optimizer's stored state is of no use"
    REPORTED = "training goes on, and reports it"
    SILENT = "nothing that is computed depends on it"


@dataclass(frozen=True)
class Rule:
    """Which values a setting may have, when it is read, and what a change of it means."""

    least: float | None = None
    """Smallest value allowed."""
    above: float | None = None
    """Values must exceed it."""
    most: float | None = None
    """Largest value allowed."""
    below: float | None = None
    """Values must stay below it."""
    read_with: tuple[str, Callable[[Any], bool]] | None = None
    """When the setting is read: in words, and as a condition on the configuration (in its recursion section: on the
    section)."""
    change: Change | None = None
    """None: that of its section."""
    in_export: bool = True
    """Of a routing method's setting: True if it describes the model and is stored in an export, False if only a run
    reads it."""

    def allows(self, value: float) -> bool:
        """Whether a number is in range."""
        return (
            (isinstance(value, int) or math.isfinite(value))  # an integer may be too large for a float
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words, such as `a value above 0`; empty where every value is allowed."""
        if self.least is not None and self.most is not None:
            return f"a value from {self.least:g} to {self.most:g}"
        if self.least is not None and self.below is not None:
            return f"a value from {self.least:g} to below {self.below:g}"
        if self.least is not None:
            return f"{self.least:g} or more"
        return "" if self.above is None else f"a value above {self.above:g}"


_RULE = "rule"


def setting(default: Any, **rule: Any) -> Any:
    """A dataclass field with this default, and a `Rule` of these values."""
    return field(default=default, metadata={_RULE: Rule(**rule)})


def rule_of(entry: Field) -> Rule:
    """The rule of a dataclass field; one that forbids nothing if it has none."""
    return entry.metadata.get(_RULE, _NO_RULE)


_NO_RULE = Rule()


def check(settings: Any, dashes: bool = True) -> None:
    """Check every field of a dataclass by itself.

    Args:
        dashes: messages name a field as its flag is spelled.
    Raises:
        ValueError: a number is out of range, or a value is none of the choices of its `Literal`.
    """
    hints = get_type_hints(type(settings))
    for entry in fields(settings):
        value, rule, hint = getattr(settings, entry.name), rule_of(entry), hints[entry.name]
        kinds = (hint, *get_args(hint))  # X, or the parts of X | None
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        shown = f"{entry.name.replace('_', '-') if dashes else entry.name}={value}"
        if choices and value is not None and value not in choices:
            raise ValueError(f"{shown} is unknown: use one of {', '.join(map(str, choices))}")
        if isinstance(value, int | float) and not rule.allows(value):
            raise ValueError(f"{shown} is out of range: use {rule.range}")
