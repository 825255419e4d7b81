"""An engine and its settings from a command line (`command.add_server`)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields

from mor_megatron.command import load_extension
from mor_megatron.inference.loading import load_model
from mor_megatron.serving.engine import Engine
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.options import EngineOptions


def server_options(args: Namespace) -> ServerOptions:
    """Settings of the server.

    Raises:
        ValueError: one is out of range.
    """
    return ServerOptions(**{"name": args.model.resolve().name, **_given(args, ServerOptions)})


def engine_options(args: Namespace) -> EngineOptions:
    """Settings of the engine.

    Raises:
        ValueError: one is out of range.
    """
    return EngineOptions(**_given(args, EngineOptions))


def load_engine(args: Namespace) -> Engine:
    """The engine, with the model and its tokenizer.

    Raises:
        ValueError: the model is missing or damaged, or a setting does not fit.
        OSError: the chat template cannot be read.
    """
    template = None if args.chat_template is None else args.chat_template.read_text(encoding="utf-8")
    options = engine_options(args)
    load_extension(args)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    if template is not None:
        if tokenizer is None:
            raise ValueError("chat-template needs a tokenizer, and this model has none: leave it out")
        tokenizer.chat_template = template
    return Engine(model, tokenizer, options)


def _given(args: Namespace, kind: type) -> dict:
    """The options that the command line gives a value."""
    values = {entry.name: vars(args).get(entry.name) for entry in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}
