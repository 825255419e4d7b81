"""Show the depth of each token of a text: a heat map of tokens x recursions, and mean depths by kind of token."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mor_megatron.command import add_extension, exit_status, load_extension
from mor_megatron.files import write_whole


def run(args: argparse.Namespace) -> None:
    """Write the picture and print the means.

    Raises:
        ValueError: the model cannot be read, or does not route.
    """
    import torch

    from mor_megatron.inference import show
    from mor_megatron.inference.loading import StreamDecoder, encode, load_model

    if args.output.suffix not in (".png", ".html"):
        raise ValueError(f"output={args.output} must end in .png or .html")
    load_extension(args)
    model, tokenizer = load_model(args.model, device=args.device)
    if not model.config.routing_method.routes:
        raise ValueError(f"model={args.model} has routing=none: every token takes every recursion")
    text = args.text if args.text is not None else args.text_file.read_text(encoding="utf-8")
    ids = encode(text, tokenizer, model.config.vocab_size)[: args.max_tokens]
    with torch.no_grad():
        depths = model(torch.tensor([ids], device=model.device), router_threshold=args.router_threshold).depths[0]
    decoder = StreamDecoder(tokenizer)
    tokens = [(decoder.next(token), depth) for token, depth in zip(ids, depths.tolist(), strict=True)]
    means = show.class_means(tokens)
    print(f"{'class':<18}{'mean depth':>12}{'tokens':>9}")
    for name, (mean, count) in means.items():
        print(f"{name:<18}{mean:>12.2f}{count:>9}")
    print(f"{'all':<18}{depths.float().mean():>12.2f}{len(ids):>9}")
    count, title = model.config.num_recursions, f"Recursions of each token, {args.model.name}"
    if args.output.suffix == ".png":
        show.heat_map(tokens, count, title, args.output)
    else:
        write_whole(args.output, show.table_page(tokens, count, title, means))


def main() -> int:
    """Exit status 0: done; 2: something cannot be read or written, or the model does not route."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    add_extension(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="text, or ids if the model has no tokenizer")
    source.add_argument("--text-file", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="output file, .png or .html")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="number of tokens to show, from the beginning of the text"
    )
    parser.add_argument(
        "--router-threshold", type=float, help="expert-choice: score from which a token continues; default 0.5"
    )
    parser.add_argument("--device", help="default: cuda if available, otherwise cpu")
    args = parser.parse_args()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
