"""What clients do to a server: requests at random times, of which some are cut off and some are malformed.

Used by `serve_load.py` and by tests. Every request is known beforehand, so that it can be repeated alone (`quiet.py`).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,:;!?\n012345"
"""Prompts are of these characters."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}you:{% endif %}"
)
"""Of conversations; it adds no other characters."""
Outcome = Literal["answered", "left", "malformed", "overloaded", "wrong"]
"""As it should be; cut off by the client; refused with status 400 or 413 and the field's name; refused with status 429;
anything else."""


@dataclass(frozen=True)
class Visit:
    """One request for a completion, or for the next turn of a conversation.

    Attributes:
        arrives: seconds after the start.
        body: JSON, or bytes as they are sent.
        leaves_after: parts of a stream that the client reads before it goes away; None: it stays.
        fault: the field that is wrong.
    """

    arrives: float
    body: dict[str, Any] | bytes
    leaves_after: int | None = None
    fault: str | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, dict) and "messages" in self.body

    @property
    def longest(self) -> int:
        """Most tokens of a well-formed one, without what the chat template adds."""
        if self.is_chat:
            system, user = (message["content"] for message in self.body["messages"])
            return len(system) + len(user[0]["text"]) + self.body["max_completion_tokens"]
        return len(self.body["prompt"]) + self.body["max_tokens"]

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream", False)


@dataclass
class Answer:
    """What became of a visit."""

    outcome: Outcome = "wrong"
    status: int = 0
    words: str = ""
    """Of an error."""
    choices: list[dict] = field(default_factory=list)
    """text, finish_reason, depths and token_logprobs of each, joined if they were streamed."""
    times: list[float] = field(default_factory=list)
    """Seconds after the request was sent when each part of a stream came, or the whole answer."""
    lost: int = 0
    """Attempts that ended with the connection, because a server was gone."""


def visits(count: int, rate: float, longest: int, most_body: int, seed: int = 0) -> list[Visit]:
    """Poisson arrivals; 5% go away in the middle, 2% are malformed.

    Args:
        rate: arrivals a second.
        longest: tokens of a sequence, prompt and continuation.
        most_body: bytes that the server takes.
    """
    r = random.Random(seed)
    beginnings = [_text(r, longest // 3) for _ in range(4)]
    faults = _faults(longest, most_body)
    leaving, wrong = _spread(count, 0.05, r), _spread(count, 0.02, r)
    found: list[Visit] = []
    now = 0.0
    for i in range(count):
        now += r.expovariate(rate)
        if i in wrong:
            name, body = faults[len([v for v in found if v.fault]) % len(faults)]
            found.append(Visit(now, body, fault=name))
            continue
        body = _body(r, longest, beginnings)
        leaves = None
        if i in leaving:
            most = "max_completion_tokens" if "messages" in body else "max_tokens"
            body |= {"stream": True, most: max(8, body[most])}
            leaves = r.randrange(0, 6)
        found.append(Visit(now, body, leaves))
    return found


def _spread(count: int, fraction: float, r: random.Random) -> set[int]:
    return set(r.sample(range(count), round(count * fraction)))


def _text(r: random.Random, length: int) -> str:
    return "".join(r.choice(ALPHABET) for _ in range(length))


def _body(r: random.Random, longest: int, beginnings: list[str]) -> dict[str, Any]:
    """A well-formed request of random length."""
    beginning = r.choice(beginnings) if r.random() < 0.3 else ""
    prompt = beginning + _text(r, r.randint(1, longest // 3))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": r.randint(1, longest // 4), "temperature": 0.0}
    options = [
        (0.5, {"stream": True, "stream_options": {"include_usage": True}}),
        (0.5, {"temperature": 1.0, "seed": r.randrange(1 << 30)}),
        (0.2, {"prompt": [ALPHABET.index(c) for c in prompt]}),
        (0.3, r.choice(({"depth": r.randint(1, 3)}, {"router_threshold": r.uniform(0.3, 0.7)}))),
        (0.2, {"return_depths": True}),
        (0.1, {"top_k": 8, "top_p": 0.9}),
        (0.1, {"repetition_penalty": 1.2, "frequency_penalty": 0.3}),
        (0.1, {"stop": [_text(r, 2), _text(r, 1)]}),
        (0.1, {"logprobs": 2, "echo": r.random() < 0.5}),
        (0.05, {"n": 2}),
    ]
    for chance, values in options:
        if r.random() < chance:
            body |= values
    return _chat(body, prompt[: longest // 3], r) if r.random() < 0.3 else body


def _chat(body: dict[str, Any], prompt: str, r: random.Random) -> dict[str, Any]:
    """The same options for a conversation of two messages."""
    cut, reports = r.randint(0, len(prompt)), body.get("logprobs")
    own = {
        "messages": [
            {"role": "system", "content": prompt[:cut]},
            {"role": "user", "content": [{"type": "text", "text": prompt[cut:]}]},
        ],
        "max_completion_tokens": body["max_tokens"],
        **({} if reports is None else {"logprobs": True, "top_logprobs": reports}),
    }
    return {key: value for key, value in body.items() if key not in ("prompt", "max_tokens", "echo")} | own


def _faults(longest: int, most_body: int) -> list[tuple[str, dict | bytes]]:
    """Malformed requests, and the field that each gets wrong."""
    return [
        ("max_tokens", {"prompt": "a", "max_tokens": "many"}),
        ("prompt", {"prompt": "a" * (longest + 1)}),
        ("messages", {"messages": [{"role": "user", "content": "a" * longest}]}),
        ("body", b'{"prompt": "a", '),
        ("body", json.dumps({"prompt": "a" * most_body}).encode()),
        ("colour", {"prompt": "a", "colour": "blue"}),
        ("prompt", {"prompt": [0, 10**6]}),
        ("prompt", {"prompt": [0.5] * 100}),
        ("temperature", {"prompt": "a", "temperature": -1.0}),
        ("messages", {"messages": [{"role": "user"}]}),
    ]


async def send(
    all_visits: list[Visit], urls: list[str], patience: float = 60.0, on_start: Callable[[int], None] | None = None
) -> list[Answer]:
    """Make all visits, each at its time, and wait for their ends.

    A client whose server is gone counts that, and asks the next one again.

    Args:
        urls: of the servers, which clients take in turn.
        patience: seconds that a client waits for anything to come.
        on_start: told the number of every visit that begins.
    """
    # A connection for each visit: one that is kept alive may be closed by the server just when it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=patience, limits=limits) as http:
        start = time.monotonic()

        async def make(i: int, visit: Visit) -> Answer:
            await asyncio.sleep(start + visit.arrives - time.monotonic())
            if on_start is not None:
                on_start(i)
            answer = Answer()
            for attempt in range(len(urls)):
                answer = Answer(lost=answer.lost)
                try:
                    await _ask(http, urls[(i + attempt) % len(urls)], visit, answer)
                    break
                except httpx.TimeoutException:
                    answer.words = "the client's patience ended"
                    break
                except httpx.TransportError as error:
                    answer.lost += 1
                    answer.words = repr(error)
            return answer

        return await asyncio.gather(*(make(i, visit) for i, visit in enumerate(all_visits)))


async def _ask(http: httpx.AsyncClient, url: str, visit: Visit, answer: Answer) -> None:
    """One attempt.

    Raises:
        httpx.TransportError: the server is gone, or nothing came in time.
    """
    content = visit.body if isinstance(visit.body, bytes) else json.dumps(visit.body).encode()
    headers = {"Content-Type": "application/json"}
    start = time.monotonic()
    path = "chat/completions" if visit.is_chat else "completions"
    async with http.stream("POST", f"{url}/v1/{path}", content=content, headers=headers) as response:
        answer.status = response.status_code
        if visit.is_stream and response.status_code == 200:
            await _read_stream(response, visit, answer, start)
            return
        found = json.loads(await response.aread())
        answer.times.append(time.monotonic() - start)
    error = found.get("error")
    if error is None:
        answer.choices = [_join([choice]) for choice in found["choices"]]
        is_full = len(answer.choices) > 0 and found["usage"]["completion_tokens"] > 0 and visit.fault is None
        answer.outcome = "answered" if is_full else "wrong"
        return
    answer.words = error["message"]
    if answer.status == 429:
        answer.outcome = "overloaded"
    elif answer.status in (400, 413) and visit.fault == error["param"]:
        answer.outcome = "malformed"


async def _read_stream(response: httpx.Response, visit: Visit, answer: Answer, start: float) -> None:
    parts: dict[int, list[dict]] = {}
    is_done = False
    if visit.leaves_after != 0:
        async for line in response.aiter_lines():
            if not line:
                continue
            data = line.removeprefix("data: ")
            if is_done := data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                answer.words = chunk["error"]["message"]
                return
            for choice in chunk["choices"]:
                answer.times.append(time.monotonic() - start)
                parts.setdefault(choice["index"], []).append(choice)
            if len(answer.times) == visit.leaves_after:
                break
    answer.choices = [_join(parts[index]) for index in sorted(parts)]
    has_left = visit.leaves_after is not None and not is_done
    is_whole = is_done and all(choice["finish_reason"] for choice in answer.choices) and answer.choices
    answer.outcome = "left" if has_left else "answered" if is_whole else "wrong"


def _join(parts: list[dict]) -> dict[str, Any]:
    """The parts of a choice as one."""
    parts = [_as_completion(part) for part in parts]
    logprobs = [part["logprobs"]["token_logprobs"] for part in parts if part["logprobs"]]
    return {
        "text": "".join(part["text"] for part in parts),
        "finish_reason": parts[-1]["finish_reason"],
        "depths": [depth for part in parts for depth in part.get("depths", [])],
        "token_logprobs": [value for values in logprobs for value in values],
    }


def _as_completion(choice: dict) -> dict:
    """What a conversation calls otherwise, under the names of a completion."""
    message = choice.get("delta", choice.get("message"))
    if message is None:
        return choice
    reports = choice["logprobs"] and {"token_logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]]}
    return choice | {"text": message["content"], "logprobs": reports}
