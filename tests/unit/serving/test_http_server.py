"""OpenAI's client against a server of a tiny model."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import httpx
import openai
import pytest
from http_server import CHARACTERS, KEY, Running, engine_of, running, tokenizer
from pydantic import ValidationError

from mor_megatron.serving import LLM, EngineOptions, SamplingParams
from mor_megatron.serving.http import run
from mor_megatron.serving.http.limits import BodyLimit
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.protocol import CompletionBody
from mor_megatron.serving.http.run import bind

JSON = {"Content-Type": "application/json"}
PROMPTS = ["once upon", "a", "the sea, the sea"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_key=KEY, max_waiting=8, max_body_size=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def alone():
    """What the engine makes of the prompts, without a server."""
    params = SamplingParams(max_tokens=12, logprobs=3, prompt_logprobs=3, last_depth=True)
    llm = LLM(engine_of().model, tokenizer(), lanes=4)
    return llm.generate(PROMPTS, params)


def joined(parts: list[dict]) -> dict:
    """Lists of log-probabilities, one after another."""
    return {name: [x for part in parts for x in part[name]] for name in parts[0]}


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_several_prompts(client, alone, stream: bool):
    """Echo, log-probabilities and depths, in one answer and as a stream."""
    ids = [list(done.prompt) for done in alone]
    extra = {"return_depths": True}
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 3, "extra_body": extra}
    if stream:
        chunks = list(
            client.completions.create(prompt=ids, stream=True, stream_options={"include_usage": True}, **options)
        )
        *chunks, last = [chunk.model_dump() for chunk in chunks]
        choices, usage = [], last["usage"]
        for index in range(3):
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            choice = {name: joined([part[name] for part in own]) for name in ("logprobs",)}
            choice |= {"text": "".join(part["text"] for part in own), "finish_reason": own[-1]["finish_reason"]}
            choices.append(choice | {"depths": [d for part in own for d in part["depths"]]})
            assert all(part["finish_reason"] is None for part in own[:-1])
    else:
        answer = client.completions.create(prompt=PROMPTS, **options).model_dump()
        choices, usage = answer["choices"], answer["usage"]
    for prompt, done, choice in zip(PROMPTS, alone, choices, strict=True):
        assert choice["text"] == prompt + done.text
        assert choice["finish_reason"] == "length"
        found, reports = choice["logprobs"], [*done.prompt_logprobs, *done.logprobs]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["text_offset"] == list(range(len(choice["text"])))
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx([report.token for report in reports[1:]], abs=3e-5)
        for token, top, report in zip(found["tokens"][1:], found["top_logprobs"][1:], reports[1:], strict=True):
            assert top.keys() == {CHARACTERS[i] for i in report.top} | {token}
        assert choice["depths"] == list(done.depths[len(done.prompt) :])
    depths = [depth for done in alone for depth in done.depths]
    assert usage["mean_depth"] == pytest.approx(sum(depths) / len(depths), abs=1e-4)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sum(map(len, PROMPTS)), 36)


def test_samples_and_their_seeds(client):
    def texts(**options) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPTS[:2], n=3, temperature=1.5, **options)
        assert [choice.index for choice in answer.choices] == list(range(6))
        return [choice.text for choice in answer.choices]

    first = texts(seed=5)
    assert len(set(first)) == 6
    assert texts(seed=5) == first
    assert texts() != first


def test_routing_of_a_request(client):
    def mean_depth(**options) -> float:
        answer = client.completions.create(model="tiny", prompt="once upon a time", extra_body=options)
        return answer.usage.mean_depth

    assert [mean_depth(depth=2), mean_depth(depth=3), mean_depth(router_threshold=1.0)] == [2.0, 3.0, 1.0]


def test_stop_strings(client, alone):
    stop = alone[0].text[4:6]
    wanted = alone[0].text.partition(stop)[0]
    options = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "stop": [stop, "6!6"]}
    choice = client.completions.create(**options).choices[0]
    assert (choice.text, choice.finish_reason) == (wanted, "stop")
    parts = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert ("".join(part.text for part in parts), parts[-1].finish_reason) == (wanted, "stop")


def test_chat(client):
    messages = [{"role": "user", "content": "tell me"}, {"role": "user", "content": [{"type": "text", "text": "a."}]}]
    prompt = "user: tell me\nuser: a.\nyou:"
    options = {"model": "tiny", "temperature": 0, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    plain = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=9, logprobs=2).choices[0]
    answer = client.chat.completions.create(messages=messages, **options)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", plain.text)
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(plain.logprobs.token_logprobs)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert answer.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == plain.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {"prompt": ""}, "prompt", "no token that begins a document"),
        ("completions", {"prompt": []}, "prompt", "use 1 to 12"),
        ("completions", {"prompt": [1, 40]}, "prompt", "40, which is not an id"),
        ("completions", {"prompt": "a" * 2048}, "prompt", "no room for another"),
        ("completions", {"prompt": ["a"] * 13}, "prompt", "use 1 to 12"),
        ("completions", {}, "prompt", "required"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature", "use 0 or more"),
        ("completions", {"prompt": "a", "max_tokens": "many"}, "max_tokens", "integer"),
        ("completions", {"prompt": "a", "n": 0}, "n", "use 1 to 12"),
        ("completions", {"prompt": "a", "n": 10**12}, "n", "use 1 to 12"),
        ("completions", {"prompt": "a", "stop": ["b"] * 33}, "stop", "at most 32"),
        ("completions", {"prompt": "a", "stop": "b" * 1001}, "stop", "1000 characters"),
        ("completions", {"prompt": "a\ud800"}, "prompt", "surrogates"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "messages",
            "surrogates",
        ),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs", "use 0 to 20"),
        ("completions", {"prompt": "a", "depth": 4}, "depth", "num_recursions=3"),
        ("completions", {"prompt": "a", "router_threshold": 2}, "router_threshold", "0 to 1"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "not permitted"),
        ("completions", {"prompt": "a", "colour": 1}, "colour", "not permitted"),
        ("completions", {"prompt": "a", "stop_token_ids": [40]}, "stop_token_ids", "40, which is not an id"),
        ("completions", {"prompt": [1.5] * 9}, "prompt", "valid string"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages", "required"),
        ("chat/completions", {"messages": [], "top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 2048}]}, "messages", "no room"),
    ],
)
def test_bad_input_is_named(http: httpx.Client, path: str, body: dict, param: str, words: str):
    answer = http.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert words in error["message"]


def test_other_refusals(http: httpx.Client, server: Running, client):
    for body in (b"{", b'{"prompt":"\xff"}'):
        answer = http.post("/v1/completions", content=body, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
    assert http.post("/v1/completions", content=b'{"prompt":"a"}').status_code == 400  # a form of another site
    assert http.get("/v2").json()["error"]["code"] == 404
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.completions.create(model="other", prompt="a")
    for key in ("wrong", "schlüssel".encode()):
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers={"Authorization": key})
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("chunked", [False, True], ids=["length-known", "chunked"])
def test_a_large_body_is_refused(http: httpx.Client, chunked: bool):
    body = b'{"prompt":"' + b"a" * 100_000
    answer = http.post("/v1/completions", content=iter([body]) if chunked else body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (413, "body", "invalid_request_error")
    assert "larger than 100000 bytes" in error["message"]


@pytest.mark.parametrize(
    "body", [{"prompt": [1.5] * 99}, {"prompt": [[1.5] * 99]}, {f"unknown{i}": 1 for i in range(99)} | {"prompt": "a"}]
)
def test_a_body_full_of_mistakes_costs_little(body: dict):
    """An error for each would take gigabytes, in the thread of all connections."""
    with pytest.raises(ValidationError) as found:
        CompletionBody.model_validate(body)
    assert found.value.error_count() <= 4  # one for each type that a prompt may have


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_null_is_as_good_as_nothing(http: httpx.Client, chat: bool):
    """In OpenAI's schema most fields may be null, and some clients send all of them."""
    names = [
        "temperature",
        "top_p",
        "n",
        "stream",
        "stop",
        "seed",
        "presence_penalty",
        "logprobs",
        "logit_bias",
        "user",
    ]
    body = {"max_tokens": 2, "depth": 1, **dict.fromkeys([*names, "tools" if chat else "best_of"])}
    body |= {"messages": [{"role": "user", "content": "a", "name": None}]} if chat else {"prompt": "a"}
    answer = http.post(f"/v1/{'chat/' * chat}completions", json=body)
    assert (answer.status_code, answer.json()["usage"]["mean_depth"]) == (200, 1.0), answer.text


def test_a_chat_takes_what_room_there_is():
    """Without max_tokens, where pages are fewer than a sequence of the greatest length could need."""
    with running(engine_of(kv_bytes=40_000)) as server:
        body = {"messages": [{"role": "user", "content": "a"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] == server.engine.longest


def test_numbers_that_no_float_can_hold(client):
    choice = client.completions.create(
        model="tiny", prompt="a", seed=10**400, max_tokens=10**400, extra_body={"stop_token_ids": list(range(40))}
    ).choices[0]
    assert choice.finish_reason == "stop"


def test_models_health_and_version(client, server: Running):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len, card.num_recursions, card.router_threshold) == ("tiny", 2048, 3, 0.5)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]


def metrics(server: Running) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics(client, server: Running):
    server.wait_until_quiet()
    before = metrics(server)
    client.completions.create(model="tiny", prompt="the sea", max_tokens=5, n=2, extra_body={"depth": 2})
    after = metrics(server)
    growth = {name: value - before.get(name, 0) for name, value in after.items()}
    assert growth["mor_generated_tokens_total"] == 10
    assert growth["mor_prompt_tokens_total"] == 14
    assert growth['mor_requests_total{finish_reason="length"}'] == 2
    assert growth["mor_request_depth_sum"] / growth["mor_request_depth_count"] == pytest.approx(2)
    names = ("time_to_first_token", "time_per_output_token", "inter_token_latency")
    assert [growth[f"mor_{name}_seconds_count"] for name in names] == [2, 2, 8]
    assert after["mor_requests_running"] == after["mor_requests_waiting"] == after["mor_kv_use"] == 0
    assert after['mor_rows{recursion="2"}'] == 0


def test_a_client_that_goes_away_frees_its_pages(client, server: Running):
    """In the midst of a stream; and before the answer to a request without one."""
    options = {"model": "tiny", "prompt": "once upon", "max_tokens": 2000}
    with client.completions.create(stream=True, **options) as stream:
        next(iter(stream))
        assert metrics(server)["mor_requests_running"] == 1
    server.wait_until_quiet()
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(timeout=0.3, **options)
    server.wait_until_quiet()
    assert metrics(server)['mor_requests_total{finish_reason="cancelled"}'] >= 2


def test_overload_is_refused(client, server: Running):
    options = {"model": "tiny", "prompt": "once upon", "max_tokens": 2000, "n": 12}
    with client.completions.create(stream=True, **options) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="try again later"):
            client.completions.create(model="tiny", prompt="a")
    server.wait_until_quiet()
    assert client.completions.create(model="tiny", prompt="a").choices


def test_a_failure_of_the_engine_is_told(monkeypatch):
    """To those who wait, and to the process, which stops."""
    engine = engine_of()
    with running(engine) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"prompt": "once", "max_tokens": 2000, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            monkeypatch.setattr(engine, "step", lambda: 1 / 0)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
        with pytest.raises(httpx.TransportError):
            all(httpx.get(f"{server.url}/health").status_code == 503 for _ in itertools.count())


def tool() -> ModuleType:
    """tools/serve.py."""
    spec = importlib.util.spec_from_file_location("serve_tool", Path(__file__).parents[3] / "tools" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_reach_engine_and_server(tmp_path: Path, monkeypatch):
    engine_of().model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    found = []
    monkeypatch.setattr(run, "serve", lambda *given: found.extend(given) or 0)
    monkeypatch.setenv("MOR_API_KEY", KEY)
    words = "--max-num-seqs 3 --max-num-batched-tokens 9 --block-size 4 --no-enable-prefix-caching --max-model-len 99"
    words += f" --port 1 --served-model-name other --device cpu --chat-template {tmp_path / 'chat.jinja'}"
    assert tool().run(tool().parse(["--model", str(tmp_path), *words.split()])) == 0
    load, options = found
    engine = load()
    assert options == ServerOptions(name="other", port=1, api_key=KEY)
    assert engine.options == EngineOptions(lanes=3, chunk=9, page_size=4, prefix_cache=False, max_length=99)
    assert engine.tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi!"


def test_missing_packages_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mor_megatron.serving.http.run")
    with pytest.raises(ValueError, match="uvicorn is not installed: pip install -r requirements-serve"):
        tool().run(tool().parse(["--model", "any"]))


def test_a_client_that_does_not_read_gives_up_its_place(monkeypatch):
    """Its connection is closed after some time. The engine does not wait for it."""

    def bind_with_little_room(options: ServerOptions) -> socket.socket:
        bound = bind(options)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return bound

    monkeypatch.setattr("http_server.bind", bind_with_little_room)
    engine = engine_of()
    options = {"max_waiting": 0, "send_timeout": 1}
    body = json.dumps({"prompt": "once upon", "max_tokens": 200, "n": 4, "stream": True, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with running(engine, **options) as server, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        silent.sendall(head.encode() + b"\r\n\r\n" + body)
        deadline = time.monotonic() + 20
        while (answer := httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})).status_code == 429:
            assert time.monotonic() < deadline, "it has its place still"
            time.sleep(0.05)
        assert answer.status_code == 200
        assert not server.engine.has_work


def test_a_body_that_arrives_too_slowly_is_refused():
    """A byte at a time. The answer comes before its end, and closes the connection."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with running(receive_timeout=1) as server, socket.socket() as slow:
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        slow.sendall(head)
        slow.settimeout(0.1)
        answer, deadline = b"", time.monotonic() + 20
        while not answer:
            assert time.monotonic() < deadline, "it waits for ever"
            slow.sendall(b" ")
            with suppress(TimeoutError):
                answer = slow.recv(4096)
        status, _, rest = answer.partition(b"\r\n")
        assert status == b"HTTP/1.1 408 Request Timeout"
        assert b"connection: close" in rest.lower()
        error = json.loads(rest.partition(b"\r\n\r\n")[2] or slow.recv(4096))["error"]
        assert (error["param"], error["message"]) == ("body", "body has not arrived within 1 s: send it faster")


def test_the_end_of_a_connection_may_be_waited_for_longer_than_a_body():
    async def app(scope, receive, send) -> None:
        kinds.extend([(await receive())["type"] for _ in range(2)])

    async def receive() -> dict:
        if kinds_to_come[0] == "http.disconnect":
            await asyncio.sleep(0.2)
        return {"type": kinds_to_come.pop(0)}

    kinds, kinds_to_come = [], ["http.request", "http.disconnect"]
    asyncio.run(BodyLimit(app, most=9, seconds=0.05)({"type": "http"}, receive, None))
    assert kinds == ["http.request", "http.disconnect"]
