"""Continue a text with a checkpoint or an export, token by token. See docs/inference.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mor_megatron.command import DTYPES, exit_status
from mor_megatron.files import write_whole


def run(args: argparse.Namespace) -> None:
    """Print the text as it comes.

    Raises:
        ValueError: the model cannot be read, or a setting does not apply to it.
    """
    import torch

    from mor_megatron.inference import show
    from mor_megatron.inference.generation import Token, generate
    from mor_megatron.inference.loading import Pieces, encode, load_model

    model, tokenizer = load_model(args.model, args.dtype, args.device)
    prompt = encode(args.prompt, tokenizer, model.config.vocab_size)
    count = model.config.num_recursions
    pieces, tokens = Pieces(tokenizer), []
    torch.manual_seed(args.seed)

    def print_token(token: Token) -> None:
        piece = pieces.next(token.id)
        tokens.append((piece, token.depth))
        print(show.terminal(piece, token.depth, count) if args.show_depth else piece, end="", flush=True)

    if args.show_depth:
        print(show.legend(count))
    cache = generate(
        model,
        prompt,
        args.max_new_tokens,
        print_token,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        depth=args.depth,
        router_threshold=args.router_threshold,
    )
    print(pieces.rest())
    if args.show_depth:
        mean = sum(depth for _, depth in tokens) / len(tokens)
        print(f"mean depth {mean:.2f} of {count}; keys and values {cache.nbytes() / 2**20:.2f} MiB", file=sys.stderr)
    if args.html is not None:
        write_whole(args.html, show.page(tokens, count, f"Depth of each token, {args.model.name}"))


def main() -> int:
    """0: done; 2: the model cannot be read, or a setting does not apply."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="export, a run's --save directory, or a checkpoint")
    parser.add_argument("--prompt", required=True, help="text; ids if the model has no tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token; above: drawn")
    parser.add_argument("--top-k", type=int, help="draw among so many tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--depth", type=int, help="recursions of every token; default: the router decides")
    parser.add_argument("--router-threshold", type=float, help="expert-choice: who goes on; default 0.5")
    parser.add_argument("--show-depth", action="store_true", help="colour each token by its depth")
    parser.add_argument("--html", type=Path, help="write the same as an HTML page")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
