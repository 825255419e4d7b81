"""Settings that nothing will read, and settings that leave something untrained: what the user is warned about."""

from __future__ import annotations

import logging
import os
from dataclasses import Field, fields

from mor_megatron.config.schema import Config
from mor_megatron.recursion.methods import METHODS, method_of
from mor_megatron.recursion.setting import rule_of

logger = logging.getLogger(__name__)


def is_read(config: Config, section: str, entry: Field) -> bool:
    """Whether this configuration reads a field of one of its sections."""
    return _condition(config, section, entry) is None


def warn_of_unread(config: Config) -> None:
    """Warn about every setting that was changed and that this configuration does not read."""
    for section, entry, value in config.settings():
        condition = _condition(config, section, entry)
        if value != entry.default and condition is not None:
            say(f"{entry.name.replace('_', '-')}={value} is ignored: it is read only with {condition}")
    for warning in method_of(config.recursion.routing).warnings(config.recursion):
        say(warning)


def _condition(config: Config, section: str, entry: Field) -> str | None:
    """The condition, in words, under which a field is read, if it does not hold.

    A setting of routing methods is read by those that declare it; what its rule says comes on top.
    """
    readers = [method for method in METHODS.values() if entry.name in {own.name for own in fields(method.Settings)}]
    if readers and method_of(config.recursion.routing) not in readers:
        return f"--routing {' or '.join(method.name for method in readers)}"
    words, holds = rule_of(entry).read_with or ("", lambda _: True)
    return None if holds(config.recursion if section == "recursion" else config) else words


def say(message: str) -> None:
    """Warn once: every rank validates the same settings, and one voice is enough."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)
