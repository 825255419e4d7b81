"""List the layouts of a run that fit into memory, fastest first: tensor and sequence parallelism, pipeline, ZeRO,
micro-batch, recomputation.

    python tools/plan.py --config examples/configs/mor_expert_nr3.yaml examples/configs/1.7b.yaml --gpus 64
    python tools/plan.py --config ... --gpus 512 --memory 80GB --machine H200 --zero-stage 1 --seq-length 4096
    python tools/plan.py --calibrate --output here.yaml
    python tools/plan.py --config ... --gpus 8 --machine here.yaml

Flags that are not listed below are settings of the run, as pretrain_mor.py takes them. Those of the layout that stand
on the command line are kept, and the others are chosen; what files say of them is ignored. Nothing is built or run:
memory is that of --dry-run, and speed follows from the table of machines in mor_megatron/planning/machines.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from mor_megatron.command import exit_status

UNITS = {"GB": 1.0, "GIB": 2**30 / 1e9, "MB": 1e-3, "MIB": 2**20 / 1e9, "TB": 1e3}


def gigabytes(text: str) -> float:
    """`80GB` or `64GiB` as a number of 10^9 bytes.

    Raises:
        ValueError: it is neither a size nor above 0.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]+)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if unit is None or not float(match[1]) > 0:
        raise ValueError(f"memory={text} is not a size: use one such as 80GB or 64GiB")
    return float(match[1]) * unit


def run(args: argparse.Namespace, settings: list[str]) -> None:
    """Calibrate, or print the layouts.

    Raises:
        ValueError: the settings do not fit, the machine is unknown, or no layout fits.
    """
    if args.calibrate:
        from mor_megatron.pretraining.calibration import calibrate  # imports torch.distributed

        calibrate(args.output)
        return
    from dataclasses import replace

    from mor_megatron.config.cli import read_config
    from mor_megatron.config.settings import read_command_line
    from mor_megatron.config.validate import validate_model
    from mor_megatron.data.tokenizers import configured_tokenizer, resolve_vocabulary
    from mor_megatron.huggingface.teacher_settings import teacher_settings
    from mor_megatron.planning.listing import listing
    from mor_megatron.planning.machines import load_machine
    from mor_megatron.planning.search import FREE, search

    if args.config is None or args.gpus is None:
        raise ValueError("--config and --gpus say what to plan for: give both, or --calibrate alone")
    if args.gpus < 1:
        raise ValueError(f"gpus={args.gpus} must be at least 1")
    machine = load_machine(args.machine, args.set)
    if args.memory is not None:
        machine = replace(machine, memory_gb=gigabytes(args.memory))
    config = validate_model(read_config(["--config", *map(str, args.config), *settings]))
    config = resolve_vocabulary(config, configured_tokenizer(config.data))
    if config.training.global_batch_size is None:
        raise ValueError("global-batch-size is not set, and decides how many micro-batches there are: give it")
    fixed = frozenset(setting.name for setting in read_command_line(settings)) & frozenset(FREE)
    found = search(config, args.gpus, machine, fixed, teacher_settings(config))
    print(listing(found, args.gpus, machine, args.top))


def main() -> int:
    """Exit status 0: done; 2: the settings do not fit, or no layout does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", help="YAML files of a run; later ones win")
    parser.add_argument("--gpus", type=int, help="ranks of the run")
    parser.add_argument("--memory", help="of one rank, such as 80GB; default: the machine's")
    parser.add_argument("--machine", default="H100", help="A100, H100, H200, B200, CPU, or a YAML file; default H100")
    parser.add_argument(
        "--set", nargs="+", metavar="FIELD=VALUE", help="properties of the machine, such as network-gbs=25 node-size=4"
    )
    parser.add_argument("--top", type=int, default=10, help="layouts to list; default 10")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine, and write --output")
    parser.add_argument("--output", type=Path, default=Path("machine.yaml"), help="file for --calibrate")
    args, settings = parser.parse_known_args()
    return exit_status(lambda: run(args, settings))


if __name__ == "__main__":
    sys.exit(main())
