"""What the programs in tools/ share. A user's error is one line on stderr and an exit status.

Programs import torch only after they have read their arguments: --help and a wrong flag should not wait for it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Value of --dtype -> torch's name."""


def add_extension(parser: ArgumentParser) -> None:
    """The option --extension, for programs that read exports; checkpoints name their extension themselves."""
    text = "Python file with the routing method or sharing strategy of an export (docs/extending.md)"
    parser.add_argument("--extension", help=text)


def load_extension(arguments: Namespace) -> None:
    """Load the file of --extension, if the option is given.

    Raises:
        ValueError: the file cannot be loaded.
    """
    if arguments.extension is not None:
        from mor_megatron.config.extension import load_extension as load

        load(arguments.extension)


def exit_status(work: Callable[[], int | None], failures: tuple[type[ValueError], ...] = ()) -> int:
    """Run a command.

    Args:
        work: the command; returns its exit status, None for 0.
        failures: errors that are a result (status 1) rather than a mistake of the user (status 2).
    Returns:
        The status from `work`; 1 or 2 after a ValueError, whose message is printed; 2 after an OSError, with its file.
    """
    try:
        return work() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, failures) else 2
    except OSError as error:
        reason = error.strerror or str(error)
        # write(2) names no file.
        print(f"error: {reason if error.filename is None else f'{error.filename} ({reason})'}", file=sys.stderr)
        return 2
