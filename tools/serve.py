"""Serve a model over HTTP by OpenAI's protocol, with a page to try it at /. See docs/serving.md.

python tools/serve.py --model mor-export
python tools/serve.py --model runs/mor --port 8080 --max-num-seqs 64 --served-model-name mor
"""

from __future__ import annotations

import argparse
import sys

from mor_megatron.command import add_server, exit_status


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal.

    Raises:
        ValueError: packages or the model are missing, or a setting does not fit.
        OSError: the address is taken, or the chat template cannot be read.
    """
    try:
        from mor_megatron.serving.http.run import serve
    except ImportError as error:
        if (error.name or "").startswith("mor_megatron"):
            raise
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-serve.txt") from error
    from mor_megatron.serving.http.build import load_engine, server_options

    options = server_options(args)
    return serve(lambda: load_engine(args), options)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server(parser)
    return parser.parse_args(argv)


def main() -> int:
    """Exit status 0: stopped by a signal; 1: the engine failed; 2: something does not fit or cannot be read; 130: a
    second SIGINT."""
    args = parse()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
