"""What --help prints: every setting there is, from its field and its docstring. The layout is tyro's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mor_megatron.config.schema import Config


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


def exit_with_help() -> None:
    """Print the help text to standard output.

    Raises:
        SystemExit: always, with status 0.
    """
    tyro.cli(_CommandLine, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
