"""What a request generates, in the two forms of OpenAI's protocol.

A choice is made from events: from all of them in one answer, or from one at a time in a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mor_megatron.inference.loading import StreamDecoder, continuation
from mor_megatron.serving.http.protocol import Body
from mor_megatron.serving.request import Event, Logprob, Request

Entry = tuple[int, Logprob | None]
"""A token, and its log-probability; None for the first token of a prompt."""


class Choice:
    """One of the choices of an answer.

    Args:
        index: its place.
        body: of the HTTP request.
        request: that generates it.
        tokenizer: of the model.
    """

    prefix: str
    """Of the answer's id."""
    kind: str
    """Of the answer."""
    chunk_kind: str
    """Of a part of a stream."""

    def __init__(self, index: int, body: Body, request: Request, tokenizer: PreTrainedTokenizerBase | None):
        self.index, self.body, self.request, self.tokenizer = index, body, request, tokenizer
        self.is_first = True

    def take(self, events: Sequence[Event]) -> dict[str, Any]:
        """What these events add."""
        entries = [(event.token, event.logprob) for event in events if event.token is not None]
        text = "".join(event.text for event in events)
        choice = {"index": self.index, **self.content(text, entries), "finish_reason": events[-1].finish_reason}
        if self.body.return_depths:
            known = events[1:] if self.is_first else events  # the first one has the depth of the prompt's last token
            choice["depths"] = [event.depth for event in known if event.depth is not None]
        self.is_first = False
        return choice

    def content(self, text: str, entries: list[Entry]) -> dict[str, Any]:
        """Text and log-probabilities of new tokens."""
        raise NotImplementedError

    def word(self, token: int) -> str:
        """Text of a token within a text."""
        return continuation(self.request.prompt[-1:], [token], self.tokenizer)


class CompletionChoice(Choice):
    """Of /v1/completions, with log-probabilities in the form of the first API."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args, prompt: str = ""):
        super().__init__(*args)
        self.prompt = prompt
        """Text to repeat."""
        self.decoder = StreamDecoder(self.tokenizer, () if self.body.echo else self.request.prompt)
        self.offset = 0

    def content(self, text: str, entries: list[Entry]) -> dict[str, Any]:
        if self.is_first and self.body.echo:
            text = self.prompt + text
            entries = [*zip(self.request.prompt, self.request.prompt_logprobs, strict=False), *entries]
        return {"text": text, "logprobs": None if self.body.logprobs is None else self._logprobs(entries)}

    def _logprobs(self, entries: list[Entry]) -> dict[str, list]:
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob in entries:
            piece = self.decoder.next(token)
            found["tokens"].append(piece)
            found["token_logprobs"].append(None if logprob is None else logprob.token)
            found["top_logprobs"].append(None if logprob is None else self._top(token, logprob))
            found["text_offset"].append(self.offset)
            self.offset += len(piece)
        return found

    def _top(self, token: int, logprob: Logprob) -> dict[str, float]:
        """Of the most likely tokens and the token itself. Of tokens with the same text, the most likely one counts."""
        top: dict[str, float] = {}
        for other, value in (*logprob.top.items(), (token, logprob.token)):
            top.setdefault(self.word(other), value)
        return top


class ChatChoice(Choice):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str, entries: list[Entry]) -> dict[str, Any]:
        message = {"content": text} | ({"role": "assistant"} if self.is_first else {})
        logprobs = {"content": [self._logprob(*entry) for entry in entries]} if self.body.logprobs else None
        return {"delta" if self.body.stream else "message": message, "logprobs": logprobs}

    def _logprob(self, token: int, logprob: Logprob) -> dict[str, Any]:
        top = [self._entry(other, value) for other, value in logprob.top.items()]
        return self._entry(token, logprob.token) | {"top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        word = self.word(token)
        is_part = "\N{REPLACEMENT CHARACTER}" in word  # of a character, whose bytes are those of several tokens
        return {"token": word, "logprob": value, "bytes": None if is_part else list(word.encode())}


def usage(requests: list[Request], n: int) -> dict[str, Any]:
    """What requests that have ended came to.

    Args:
        requests: `n` for each prompt.
    """
    prompt, new = sum(len(r.prompt) for r in requests[::n]), sum(len(r.generated) for r in requests)
    depths = [depth for request in requests for depth in request.depths]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached for request in requests[::n])},
        "mean_depth": round(sum(depths) / len(depths), 4) if depths else None,
    }
