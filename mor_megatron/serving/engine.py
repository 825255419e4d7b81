"""The engine: requests in, events out, one step at a time.

A *turn* runs the layers outside the shared block, for all sequences whose rows have left the block. Between turns,
passes of the block take the rows of all others one recursion further, each at its own. `turn_at` sequences must wait
before a turn runs: 1 is purely depth-wise, all lanes is lock-step.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.options_mor import routing_options
from mor_megatron.inference.loading import StreamDecoder
from mor_megatron.serving.graphs import build_lanes
from mor_megatron.serving.kernel import choose
from mor_megatron.serving.options import EngineOptions, check_model
from mor_megatron.serving.packed import pack
from mor_megatron.serving.pages import build_store
from mor_megatron.serving.prefix import PrefixCache
from mor_megatron.serving.request import Event, FinishReason, Logprob, Request, SamplingParams
from mor_megatron.serving.runner import Runner
from mor_megatron.serving.sampling import logprobs_of, sample
from mor_megatron.serving.scheduler import Scheduler
from mor_megatron.serving.text import Text
from mor_megatron.serving.turns import Turns


@dataclass(frozen=True)
class Status:
    """What an engine is doing, and has done."""

    running: int
    waiting: int
    rows: list[int]
    """Rows inside the block by recursion, [Nr]."""
    kv_use: float
    """Fraction of the memory for keys and values that requests have; what only the prefix cache has is not in it."""
    preemptions: int
    prompt_tokens: int
    """Of admitted requests."""
    cached_tokens: int
    """Those among them that the prefix cache had."""
    passes: int
    turns: int


class Engine:
    """Continues many prompts at once.

    `add` and `cancel` may be called from any thread, everything else from the one that calls `step`.

    Args:
        model: in evaluation mode.
        tokenizer: gives the text of tokens; None: their numbers.
        options: of the engine.
    Raises:
        ValueError: the model or an option does not fit.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        options: EngineOptions | None = None,
    ):
        check_model(model)
        self.model, self.tokenizer, self.options = model, tokenizer, options or EngineOptions()
        options, config, plan = self.options, model.config, model.model.plan
        self.max_length = options.max_length or config.max_position_embeddings
        if self.max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length={self.max_length} exceeds the model's max_position_embeddings="
                f"{config.max_position_embeddings}: use at most that"
            )
        self.turns = Turns(options.turn_at, plan.num_recursions)
        # The time of other processes on the same cores says nothing about the model.
        self._clock = time.thread_time if model.device.type == "cpu" else time.perf_counter
        recursions = plan.num_recursions if config.kv_mode == "caching" else 1
        self.store = build_store(
            {use.index for use in (*plan.first, *plan.last)},
            {use.index for use in plan.pass_layers(0)},
            recursions,
            model.model.router.planned_fractions(),
            options.lanes,
            self.max_length,
            options.page_size,
            options.kv_bytes,
            torch.empty(1, config.num_key_value_heads, config.head_dim, dtype=model.dtype, device=model.device),
        )
        self.kv_tokens = self.store.tokens(model.model.router.planned_fractions())
        """Tokens that the pages have room for, if the router selects as many as planned."""
        self.longest = min(self.max_length, self.store.longest())
        """Most tokens of one sequence, whatever recursions they take."""
        if not self.longest:
            raise ValueError(f"kv_bytes={options.kv_bytes} has no room for a page of each recursion: use more")
        kernel = choose(options.attention, model.dtype, model.device)
        self.prefixes = PrefixCache(self.store) if options.prefix_cache else None
        computed, on_cpu = model, model.device.type == "cpu"
        if on_cpu and kernel is not None and torch.get_num_threads() == 1:  # the compiled products use one thread
            computed = pack(model)
        elif model.device.type == "cuda" and options.attention != "torch":
            from mor_megatron.serving.fused import fuse  # not before: it needs Megatron-core

            computed = fuse(model)
        self.runner = Runner(computed, self.store, self.max_length, kernel)
        if not on_cpu:
            self.runner.lanes = build_lanes(
                computed, self.store, self.runner.rotation, options.lanes, kernel, options.enforce_eager
            )
        self.scheduler = Scheduler(self.runner, self.prefixes, options.lanes, options.chunk)
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._ids = itertools.count()
        self._closed = False
        self._arrived = threading.Event()

    # From any thread.

    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        on_event: Callable[[Event], None] | None = None,
        request_id: str | None = None,
    ) -> Request:
        """A request, which the next steps run.

        Args:
            prompt: ids.
            on_event: called in the engine's thread for every event; it must neither block nor raise.
            request_id: default a number.
        Raises:
            ValueError: the request does not fit the model or the engine; or the engine has been closed.
        """
        params = params or SamplingParams()
        if self._closed:
            raise ValueError("the engine is closed: it takes no more requests")
        depth, threshold = routing_options(self.model.config, params.depth, params.router_threshold)
        self._check(prompt, params)
        request = Request(
            id=str(next(self._ids)) if request_id is None else request_id,
            prompt=list(prompt),
            params=params,
            depth=depth,
            threshold=threshold,
            on_event=on_event,
            text=Text(StreamDecoder(self.tokenizer, prompt), params.stop),
        )
        self._inbox.append(request)
        self._arrived.set()
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next step, unless it has ended by itself."""
        self._cancelled.append(request)
        self._arrived.set()

    def status(self) -> Status:
        """What the engine is doing."""
        scheduler, kinds = self.scheduler, self.store.kinds
        layers = sum(pages.count * len(pages.layers) for pages in kinds)
        return Status(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            rows=self.runner.open_rows(),
            kv_use=sum((p.used - p.reclaimable()) * len(p.layers) for p in kinds) / layers,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            passes=self.runner.passes,
            turns=self.runner.turns,
        )

    def close(self) -> None:
        """Take no more requests. Those that are there go on (`drain`)."""
        self._closed = True
        self._arrived.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until there is something to do, or the engine is closed."""
        if not self.has_work and not self._closed:
            self._arrived.wait(timeout)
        self._arrived.clear()

    @property
    def has_work(self) -> bool:
        """Whether there are requests."""
        scheduler = self.scheduler
        return bool(self._inbox or self._cancelled or scheduler.waiting or scheduler.running)

    # From the engine's thread.

    def drain(self) -> None:
        """Run all requests to their ends."""
        while self.has_work:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """A turn if one is due, and a pass of the block."""
        self._read_inbox()
        finished, arrivals = self.scheduler.finished(), self.scheduler.arrivals()
        if not self.runner.is_open or self.turns.is_due(
            len(finished) + arrivals, len(self.scheduler.running) + arrivals
        ):
            self._turn(finished)
        self.scheduler.reserve_pass()
        if self.runner.is_open:
            self._pass()

    def _pass(self) -> None:
        """A pass of the block."""
        rows, start = sum(self.runner.open_rows()), self._clock()
        self.runner.advance()
        if rows <= len(self.scheduler.running):  # no prompts
            self.turns.saw_pass(rows, self._clock() - start)

    def _read_inbox(self) -> None:
        # Before the inbox is read: what has been cancelled by now has been added by now.
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        while self._inbox:
            request = self._inbox.popleft()
            self.scheduler.waiting.append(request)
            if request.params.max_tokens == 0 and request.params.prompt_logprobs is None:
                self._end(request, "length")
        for request in cancelled:
            if not request.has_ended:
                self._end(request, request.finish_reason or "cancelled")

    def _turn(self, finished: list[Request]) -> None:
        """Layers around the block: last layers and sampling for what has left it, first layers for what enters."""
        count, start = sum(request.in_flight for request in finished), self._clock()
        if finished:
            self._leave(finished)
        self.scheduler.admit()
        rows = self.scheduler.entering()
        if rows.ids:
            self.runner.enter(rows)
        if len(rows.ids) <= count == len(finished):  # no prompts
            self.turns.saw_turn(count, self._clock() - start, [request.depths[-1] for request in finished])

    def _leave(self, finished: list[Request]) -> None:
        """Last layers of requests whose rows have passed the block, and their next tokens."""
        finished = sorted(finished, key=lambda request: request.slot)
        wanted = {request.slot: self._wanted(request) for request in finished}
        left = self.runner.leave([request.slot for request in finished], wanted)
        row, targets = 0, {}
        for request in finished:
            end = row + wanted[request.slot]
            request.depths[request.done : request.fed] = left.depths[request.slot]
            if _needs_prompt_logprobs(request):
                _report_prompt(request, left.logits[row:end])
            request.done, row = request.fed, end
            if self.prefixes is not None:
                self.prefixes.publish(request)
            if request.done == len(request.tokens) and request.finish_reason is None and request.params.max_tokens > 0:
                targets[request] = end - 1
        if targets:
            self._sample(targets, left.logits)
        for request in finished:
            is_over = request.finish_reason is not None or request.params.max_tokens == 0
            if request.slot >= 0 and is_over and request.done == len(request.tokens):
                self._end(request, request.finish_reason or "length")

    def _wanted(self, request: Request) -> int:
        """Of how many of the last rows of a request in flight logits are needed."""
        if _needs_prompt_logprobs(request):
            return request.in_flight
        return int(request.fed == len(request.tokens) and request.finish_reason is None)

    def _sample(self, targets: dict[Request, int], logits: Tensor) -> None:
        """A token for each request, from its row of the logits."""
        requests, rows = list(targets), list(targets.values())
        if len(rows) < len(logits):
            logits = logits[torch.tensor(rows, device=logits.device)]
        tokens = sample(logits, requests, self.ends)
        reports = logprobs_of(logits, tokens, [request.params.logprobs for request in requests])
        for request, token, report in zip(requests, tokens, reports, strict=True):
            self._accept(request, token, report)

    def _accept(self, request: Request, token: int, logprob: Logprob | None) -> None:
        """A new token, and whether it is the last one."""
        params = request.params
        request.tokens.append(token)
        if logprob is not None:
            request.logprobs.append(logprob)
        generated = len(request.tokens) - len(request.prompt)
        is_end = token in params.stop_token_ids or (token in self.ends and not params.ignore_eos)
        text = "" if is_end else request.text.next(token)
        reason: FinishReason | None = None
        if is_end or request.text.found is not None:
            reason, request.stopped_by = "stop", token if is_end else request.text.found
        elif generated >= params.max_tokens or len(request.tokens) >= self.max_length:
            reason = "length"
        request.finish_reason = reason
        if reason is not None and not params.last_depth:
            self._end(request, reason, token, text, logprob)
        else:
            self._tell(request, token, text, logprob, None)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        logprob: Logprob | None = None,
    ) -> None:
        """The last event; all that a request holds is given back."""
        self.scheduler.remove(request)
        request.finish_reason, request.has_ended = reason, True
        self._tell(request, token, text + request.text.rest(), logprob, reason)

    def _tell(
        self, request: Request, token: int | None, text: str, logprob: Logprob | None, reason: FinishReason | None
    ) -> None:
        request.shown += text
        if request.on_event is not None:
            before = len(request.tokens) - (1 if token is None else 2)
            depth = request.depths[before] if 0 <= before < len(request.depths) else None
            request.on_event(Event(request, token, text, logprob, depth, reason))

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        size, vocab_size = len(prompt), self.model.config.vocab_size
        if not prompt:
            raise ValueError("prompt is empty: give at least one token")
        if size + min(1, params.max_tokens) > self.max_length:
            raise ValueError(
                f"prompt of {size} tokens leaves no room for another within max_length={self.max_length}: shorten it"
            )
        if min(size + params.max_tokens, self.max_length) > self.longest:
            raise ValueError(
                f"prompt of {size} tokens and max_tokens={params.max_tokens} may not fit, as the pages have room for "
                f"{self.longest} tokens that take all recursions: use fewer tokens, or more kv_bytes"
            )
        for name, tokens in (("prompt", prompt), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
            if wrong is not None:
                raise ValueError(f"{name} has {wrong}, which is not an id: use 0 to {vocab_size - 1}")


def _needs_prompt_logprobs(request: Request) -> bool:
    return request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt)


def _report_prompt(request: Request, logits: Tensor) -> None:
    """Add the log-probabilities that the rows in flight give, [in flight, V]; a preempted request has some already."""
    following = request.prompt[request.done + 1 : request.fed + 1]
    counts = [request.params.prompt_logprobs] * len(following)
    new = logprobs_of(logits[: len(following)], following, counts)
    first = request.done + 1
    if request.done == 0:
        new, first = [None, *new], 0
    request.prompt_logprobs += new[len(request.prompt_logprobs) - first :]


__all__ = ["Engine", "Status"]
