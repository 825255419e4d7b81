"""The application: addresses, and who may use them."""

from __future__ import annotations

import asyncio
import copy
import hmac
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mor_megatron.inference.loading import document_start, encode
from mor_megatron.serving.engine import Engine
from mor_megatron.serving.http import errors
from mor_megatron.serving.http.choices import ChatChoice, Choice, CompletionChoice
from mor_megatron.serving.http.errors import ApiError
from mor_megatron.serving.http.generation import Generation
from mor_megatron.serving.http.limits import BodyLimit
from mor_megatron.serving.http.metrics import Metrics
from mor_megatron.serving.http.options import ServerOptions
from mor_megatron.serving.http.protocol import Body, ChatBody, CompletionBody, field_of
from mor_megatron.serving.http.worker import Call, Worker
from mor_megatron.serving.request import SamplingParams

PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {  # the page needs this server and nothing else
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'"
}


class Service:
    """Answers requests by an engine.

    Args:
        engine: that nobody else uses.
        options: of the server.
        on_death: called in the engine's thread if it fails.
    """

    def __init__(self, engine: Engine, options: ServerOptions, on_death: Callable[[], None] | None = None):
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine)
        limit = engine.options.lanes + options.max_waiting
        self.worker = Worker(engine, self.metrics.observer, limit, on_death)
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # the engine's thread uses its own
        self.started = int(time.time())

    async def complete(self, body: CompletionBody, http: Request) -> Response:
        """POST /v1/completions."""
        self._check(body)
        self._check_logprobs("logprobs", body.logprobs)
        count = len(body.prompts) * body.n
        if not 1 <= count <= self.worker.limit:
            raise ApiError(f"prompt and n make {count} sequences: use 1 to {self.worker.limit}", param="prompt")
        prompts = [await self._encode(prompt, "prompt") for prompt in body.prompts]
        echoed = body.logprobs if body.echo else None
        params = self._params(body, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=echoed)
        call = self._submit(body, prompts, params)
        texts = [self._text(prompt) if body.echo else "" for prompt in body.prompts for _ in range(body.n)]
        choices = [
            CompletionChoice(i, body, request, self.tokenizer, prompt=text)
            for i, (request, text) in enumerate(zip(call.requests, texts, strict=True))
        ]
        return await self._answer(body, call, choices, http)

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check(body)
        self._check_logprobs("top_logprobs", body.top_logprobs)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                f"top_logprobs={body.top_logprobs} does nothing without logprobs: set it to true", param="top_logprobs"
            )
        prompt = await self._encode(self._conversation(body), "messages")
        most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        params = self._params(
            body,
            max_tokens=max(1, self.engine.longest - len(prompt)) if most is None else most,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
        call = self._submit(body, [prompt], params)
        choices = [ChatChoice(i, body, request, self.tokenizer) for i, request in enumerate(call.requests)]
        return await self._answer(body, call, choices, http)

    def card(self) -> dict:
        """Of the model, in /v1/models."""
        config = self.engine.model.config
        return {
            "id": self.options.name,
            "object": "model",
            "created": self.started,
            "owned_by": "mor-megatron",
            "max_model_len": self.engine.max_length,
            "num_recursions": config.num_recursions,
            "router_threshold": config.router_threshold if config.routing_method.looks_ahead else None,
        }

    def _check(self, body: Body) -> None:
        if body.model not in (None, self.options.name):
            raise ApiError(f"model {body.model!r} is not served here: use {self.options.name!r}", 404, "model")
        if not 1 <= body.n <= self.worker.limit:
            raise ApiError(f"n={body.n} is out of range: use 1 to {self.worker.limit}", param="n")

    def _check_logprobs(self, name: str, count: int | None) -> None:
        if not 0 <= (count or 0) <= self.options.max_logprobs:
            raise ApiError(f"{name}={count} is out of range: use 0 to {self.options.max_logprobs}", param=name)

    def _conversation(self, body: ChatBody) -> str:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ApiError(
                "the model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                param="messages",
            )
        messages = [message.for_template() for message in body.messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise ApiError(f"messages do not fit the chat template: {error}", param="messages") from error

    async def _encode(self, prompt: str | list[int], field: str) -> list[int]:
        """Ids of a prompt, without holding up others. An empty text is the beginning of a document."""
        if not isinstance(prompt, str):
            return prompt
        model = self.engine.model
        try:
            if not prompt:
                return document_start(model)
            prompt.encode()  # half a surrogate pair is valid JSON
            return await asyncio.to_thread(encode, prompt, self.tokenizer, model.config.vocab_size)
        except ValueError as error:
            raise ApiError(f"{field}: {error}", param=field) from error

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return "".join(f"{token} " for token in prompt) if self.tokenizer is None else self.tokenizer.decode(prompt)

    def _params(self, body: Body, **own) -> SamplingParams:
        try:
            return body.sampling_params(**own)
        except ValueError as error:
            raise ApiError(str(error), param=field_of(str(error), body)) from error

    def _submit(self, body: Body, prompts: list[list[int]], params: SamplingParams) -> Call:
        """`n` requests for each prompt; samples of one prompt have different seeds."""
        each = [params if params.seed is None else replace(params, seed=params.seed + i) for i in range(body.n)]
        try:
            return self.worker.submit([p for p in prompts for _ in each], each * len(prompts))
        except ValueError as error:
            raise ApiError(str(error), param=field_of(str(error), body)) from error

    async def _answer(self, body: Body, call: Call, choices: list[Choice], http: Request) -> Response:
        return await Generation(self.options.name, body, call, choices).answer(http)


def build_app(engine: Engine, options: ServerOptions, on_death: Callable[[], None] | None = None) -> FastAPI:
    """The application. The engine runs from its startup to its shutdown, which waits for open requests.

    Args:
        on_death: called in the engine's thread if it fails.
    """
    service = Service(engine, options, on_death)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if options.api_key is not None and not hmac.compare_digest(given.encode(), options.api_key.encode()):
            raise ApiError("the API key is missing or wrong: send `Authorization: Bearer KEY`", 401)

    # Without FastAPI's own pages, which load scripts from another host.
    app = FastAPI(
        title="MoR-Megatron",
        version=version("mor-megatron"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, most=options.max_body_size, seconds=options.receive_timeout)
    app.state.service = service  # what is not asynchronous would take a thread of a pool of forty
    errors.install(app)
    keyed = [Depends(authorize)]
    app.post("/v1/completions", dependencies=keyed)(service.complete)
    app.post("/v1/chat/completions", dependencies=keyed)(service.chat)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict:
        return {"object": "list", "data": [service.card()]}

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({}, 200 if service.worker.is_alive else 503)

    @app.get("/version")
    async def versions() -> dict:
        return {"version": app.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    return app
