"""Convert a transformers directory to a checkpoint that training can start from, with --load DIR --finetune.

Our exports are restored exactly. Models of the LLaMA family are imported unchanged, or as the start of a recursive
model. Checkpoints of the paper's authors need the configuration of their run. See docs/inference.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

from mor_megatron.command import add_extension, exit_status, load_extension
from mor_megatron.config import schema
from mor_megatron.huggingface.uptraining import ADAPTER_STARTS, INITIALIZATIONS
from mor_megatron.recursion.plan import KV_MODES, STRATEGIES
from mor_megatron.recursion.relaxation import RelaxationSettings

_RELAXATION = tuple(entry.name for entry in fields(RelaxationSettings))
_SHARING = ("sharing_strategy", "initialization", "depth_rounding", "seed", "kv_mode", "adapters", *_RELAXATION)
_OF_LLAMA = ("max_position_embeddings", "num_recursions", "num_layers", *_SHARING)


def run(args: argparse.Namespace) -> Path:
    """Read the model, print the source of each layer, and write the checkpoint.

    Raises:
        ValueError: the kind of model is not supported, or a flag does not apply to it.
    """
    from mor_megatron.huggingface.importing import (
        kind_of,
        read_authors,
        read_export,
        read_llama,
        read_tokenizer,
        write_checkpoint,
    )
    from mor_megatron.huggingface.low_rank import table

    load_extension(args)
    given = {name: getattr(args, name) for name in _OF_LLAMA if getattr(args, name) is not None}
    kind = "authors" if args.authors_config is not None else kind_of(args.model)
    if kind != "llama" and given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} applies to models of the LLaMA family only")
    if kind == "authors":
        weights, config = read_authors(args.model, args.authors_config)
    elif kind == "mor":
        weights, config = read_export(args.model)
        config = replace(config, recursion=replace(config.recursion, extension=args.extension))
    else:
        if given.get("num_recursions", 1) == 1 and set(given) & set(_SHARING):
            raise ValueError("sharing and its initialization need --num-recursions above 1")
        if "adapters" in given and given.get("relaxation") != "lora":
            raise ValueError("--adapters needs --relaxation lora")
        names = ("num_recursions", "sharing_strategy", "depth_rounding", "kv_mode", *_RELAXATION)
        settings = {name: given[name] for name in names if name in given}
        recursion = schema.RecursionConfig(**settings, extension=args.extension)  # the current one, as extended
        weights, config, sources, residuals = read_llama(
            args.model,
            recursion,
            given.get("num_layers"),
            given.get("initialization", "stepwise"),
            given.get("seed", 0),
            given.get("max_position_embeddings"),
            given.get("adapters", "svd"),
        )
        for physical, chosen in sorted(sources.items()):
            how = "mean of layers" if len(chosen) > 1 else "layer"
            print(f"layer {physical}: {how} {', '.join(map(str, chosen))}")
        if config.recursion.relaxation != "none":
            print(table(residuals))
    return write_checkpoint(weights, config, args.output, read_tokenizer(args.model))


def main() -> int:
    """Exit status 0: imported; 2: something cannot be read, or these models do not support it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and weights")
    parser.add_argument("--output", type=Path, required=True, help="new directory for the checkpoint")
    add_extension(parser)
    parser.add_argument("--authors-config", type=Path, help="YAML of the authors' run, for one of their checkpoints")
    group = parser.add_argument_group("models of the LLaMA family (Llama, Mistral, Qwen2), and up-training")
    group.add_argument("--max-position-embeddings", type=int, help="longest sequence; default: the model's")
    group.add_argument("--num-recursions", type=int, help="number of recursions; default 1: nothing is shared")
    group.add_argument("--num-layers", type=int, help="unrolled depth; default: the model's")
    group.add_argument("--sharing-strategy", help=f"{', '.join(STRATEGIES)}, or one of the extension")
    group.add_argument("--depth-rounding", choices=("error", "down", "up"))
    group.add_argument(
        "--initialization", choices=INITIALIZATIONS, help="source of each shared layer; default: stepwise"
    )
    group.add_argument("--seed", type=int, help="seed for what is drawn; default 0")
    group.add_argument("--kv-mode", choices=KV_MODES, help="whose keys and values a recursion attends to")
    group = parser.add_argument_group("recursions that differ (settings of pretrain_mor.py), and how they begin")
    for name, kind in get_type_hints(RelaxationSettings).items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action="store_true", default=None)
        else:
            numbers = [part for part in (kind, *get_args(kind)) if part in (int, float)]
            choices = None if numbers else get_args(kind)
            group.add_argument(flag, type=numbers[0] if numbers else str, choices=choices)
    group.add_argument("--adapters", choices=ADAPTER_STARTS, help="svd: close to source - shared weight (default)")
    args = parser.parse_args()
    return exit_status(lambda: print(f"{args.model} -> {run(args)}"))


if __name__ == "__main__":
    sys.exit(main())
