"""A request, from its prompt to the reason for its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mor_megatron.recursion.setting import check, setting
from mor_megatron.serving.text import Text

FinishReason = Literal["stop", "length", "cancelled"]
"""The model or a stop condition ended the text; max_tokens or max_length was reached; the request was cancelled."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt, with vLLM's names.

    Raises:
        ValueError: a value is out of range.
    """

    max_tokens: int = setting(16, least=0)
    """Most tokens to generate."""
    min_tokens: int = setting(0, least=0)
    """Tokens before which neither end of sequence nor `stop_token_ids` can be sampled."""
    temperature: float = setting(0.0, least=0)
    """0 takes the most likely token; above 0, tokens are sampled."""
    top_k: int = setting(0, least=0)
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = setting(1.0, least=0, most=1)
    """Sample from the most likely tokens of total probability p."""
    min_p: float = setting(0.0, least=0, most=1)
    """Sample from tokens at least min_p times as likely as the most likely one."""
    presence_penalty: float = setting(0.0, least=-2, most=2)
    """Subtracted from the logits of tokens that were generated before."""
    frequency_penalty: float = setting(0.0, least=-2, most=2)
    """Subtracted from logits once for each time that the token was generated before."""
    repetition_penalty: float = setting(1.0, above=0)
    """Divides positive logits and multiplies negative ones, of tokens in prompt or continuation."""
    seed: int | None = None
    """Seed of this request's samples: they do not depend on what runs beside it. None: another seed every time."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it. One string may be given by itself."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, like the end of sequence."""
    ignore_eos: bool = False
    """Go on after the end of sequence."""
    logprobs: int | None = setting(None, least=0)
    """Report the log-probability of each generated token and of this many most likely ones."""
    prompt_logprobs: int | None = setting(None, least=0)
    """The same for the tokens of the prompt, which is then computed in full, without cached prefixes."""
    depth: int | None = setting(None, least=1)
    """Recursions of every token; default the model's setting."""
    router_threshold: float | None = setting(None, least=0, most=1)
    """Expert-choice: a token goes on if the sigmoid of its logit is at least this; default the model's setting."""
    last_depth: bool = False
    """Pass the last token through the model, too: nothing follows it, but its depth becomes known."""

    def __post_init__(self):
        check(self, dashes=False)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if "" in self.stop:
            raise ValueError("stop='' would end every text at once: leave it out")


@dataclass(frozen=True)
class Logprob:
    """Log-probabilities at one position, before penalties and temperature."""

    token: float
    """Of the token that stands there."""
    top: dict[int, float]
    """Of the most likely tokens, the most likely one first."""


@dataclass(frozen=True)
class Event:
    """One step of a request's output."""

    request: Request
    token: int | None
    """The new token; None in a last event that only tells the end."""
    text: str
    """What can be shown now. Text that may turn out to begin a stop string comes later, or never."""
    logprob: Logprob | None
    depth: int | None
    """Recursions of the token before the new one, whose state predicted it; None where it is not known."""
    finish_reason: FinishReason | None
    """Set in the last event."""


@dataclass(eq=False)
class Request:
    """A request and how far it has come. The engine's thread writes it; others may read it after the last event."""

    id: str
    prompt: list[int]
    params: SamplingParams
    depth: int | None
    """Fixed number of recursions; None: the router decides."""
    threshold: float
    on_event: Callable[[Event], None] | None = None
    """Called in the engine's thread for every event; it must neither block nor raise."""
    text: Text | None = None
    tokens: list[int] = field(default_factory=list)
    """Prompt and continuation."""
    depths: list[int] = field(default_factory=list)
    """Recursions of the tokens that have passed the model, in order. They survive a preemption: a second pass follows
    them, because rounding could flip a close decision."""
    logprobs: list[Logprob] = field(default_factory=list)
    """Of the continuation."""
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)
    """Of the prompt; None for its first token."""
    shown: str = ""
    """Text of the continuation."""
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None
    """The token or the string that ended the text."""
    slot: int = -1
    """Place among the running sequences, which says where its keys and values are; -1: none."""
    fed: int = 0
    """Tokens that have entered the model."""
    done: int = 0
    """Tokens that have left it: their keys and values are complete."""
    cached: int = 0
    """Tokens whose keys and values were found in the prefix cache when the request was first admitted."""
    preemptions: int = 0
    chain: list[Any] = field(default_factory=list)
    """Its blocks in the prefix cache."""
    has_ended: bool = False
    """Whether the last event has been told."""

    def __post_init__(self):
        self.tokens = list(self.prompt)
        seed = self.params.seed
        self.random = random.Random(seed) if seed is not None else random.Random()

    @property
    def generated(self) -> list[int]:
        """The continuation, with the token that ended it."""
        return self.tokens[len(self.prompt) :]

    @property
    def in_flight(self) -> int:
        """Tokens inside the model."""
        return self.fed - self.done

    @property
    def mean_depth(self) -> float:
        """Mean number of recursions of the tokens that have passed the model."""
        return sum(self.depths) / max(1, len(self.depths))
