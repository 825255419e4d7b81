"""Bodies of requests, as OpenAI's clients send them.

Ranges are checked by `SamplingParams`, where they are written once. Fields that are not known are refused, rather than
ignored: an answer would not be what was asked for.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mor_megatron.serving.request import SamplingParams

MOST_STOPS = 32
"""Stop strings of a request: every token is searched for them."""
LONGEST_STOP = 1000
"""Characters of each: the text is compared with all of their beginnings."""

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first wrong entry: a body could have millions, and an error for each."""


class Strict(BaseModel):
    """Types are not converted. null is as good as nothing. Unknown fields are refused: the first one speaks for all."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        unknown = [name for name in given if name not in cls.model_fields]
        return {name: value for name, value in given.items() if name in cls.model_fields or name == unknown[0]}


class Body(Strict):
    """What both kinds of generation have in common; names and meanings are those of OpenAI and vLLM."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int | None = None
    stop: str | Many[str] = []
    stop_token_ids: Many[int] = []
    ignore_eos: bool = False
    user: str | None = None
    """Not used."""
    depth: int | None = None
    """Recursions of every token."""
    router_threshold: float | None = None
    """Score from which a token goes on, in models that select by threshold."""
    return_depths: bool = False
    """Choices have `depths`: the recursions of each generated token."""

    def sampling_params(self, **own: Any) -> SamplingParams:
        """Parameters of each request.

        Raises:
            ValueError: a value is out of range; the message begins with the field's name.
        """
        names = {entry.name for entry in fields(SamplingParams)} & type(self).model_fields.keys()
        values = {name: getattr(self, name) for name in names - {"logprobs", "max_tokens"}}
        params = SamplingParams(**values, last_depth=self.return_depths, **own)
        if len(params.stop) > MOST_STOPS:
            raise ValueError(f"stop has {len(params.stop)} strings: use at most {MOST_STOPS}")
        if any(len(string) > LONGEST_STOP for string in params.stop):
            raise ValueError(f"stop has a string of more than {LONGEST_STOP} characters: use shorter ones")
        return params

    @property
    def sends_usage(self) -> bool:
        """Whether a last chunk of a stream tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(Strict):
    include_usage: bool = False


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each by itself, as text or ids."""
        is_one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else list(self.prompt)


class Part(Strict):
    """Of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: str
    content: str | Many[Part]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Role and text."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(p.text for p in parts)}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Many[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """The newer name of `max_tokens`. Default: as many as fit."""
    logprobs: bool = False
    top_logprobs: int = 0


def field_of(message: str, body: Body) -> str:
    """The field that a message of the engine is about: the one that it begins with, or else the prompt."""
    names = type(body).model_fields
    word = re.match(r"\w+", message)
    return word[0] if word and word[0] in names else "prompt" if "prompt" in names else "messages"
