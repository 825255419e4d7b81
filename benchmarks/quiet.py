"""What requests get alone, on an idle engine, and whether rounding explains a difference.

Under load, other rows stand beside a request's, so its sums are rounded otherwise. A decision between two tokens, or
about a recursion, that is closer than this may flip, and all that follows with it. A difference is explained only if
the same request, alone, gets what was served from weights that are changed by about `ROUNDING`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from traffic import Answer, Visit
from transformers import PreTrainedTokenizerBase

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.loading import encode
from mor_megatron.serving import Engine, EngineOptions, Request
from mor_megatron.serving.http.protocol import Body, ChatBody, CompletionBody

ROUNDING = 1e-5  # relative; fp32 rounds at 6e-8, and sums of a few layers collect some of that
LOGPROB = 1e-3  # absolute; what ROUNDING makes of a log-probability
TRIALS = 16


@dataclass(frozen=True)
class Choice:
    """One continuation."""

    text: str
    finish_reason: str
    depths: list[int]
    token_logprobs: list[float | None]


class QuietRun:
    """Answers requests one at a time.

    Args:
        model: of the server.
        tokenizer: of the server.
    """

    def __init__(self, model: MoRForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.engine = self._engine(model)
        self._changed: list[Engine] = []

    def difference(self, visit: Visit, answer: Answer) -> str | None:
        """How an answer, or the part of it that the client read, differs from what the request gets alone; None: not
        at all."""
        return _difference(self.choices(self.engine, visit), answer)

    def is_rounding(self, visit: Visit, answer: Answer) -> bool:
        """Whether rounding explains a difference."""
        if not self._changed:
            self._changed = [self._engine(_changed(self.engine.model, seed)) for seed in range(TRIALS)]
        return any(_difference(self.choices(engine, visit), answer) is None for engine in self._changed)

    def choices(self, engine: Engine, visit: Visit) -> list[Choice]:
        """What an engine makes of a request that has it to itself."""
        prompt, body, own = self._asked(visit)
        ids = encode(prompt, self.tokenizer, engine.model.config.vocab_size) if isinstance(prompt, str) else prompt
        params = body.sampling_params(**own)
        seeds = [params.seed if params.seed is None else params.seed + i for i in range(body.n)]
        requests = []
        for seed in seeds:
            requests.append(engine.add(ids, replace(params, seed=seed)))
            engine.drain()
        return [self._choice(request, body) for request in requests]

    def _asked(self, visit: Visit) -> tuple[str | list[int], Body, dict]:
        """The prompt, the body, and the parameters that the two kinds of bodies name differently."""
        if visit.is_chat:
            body = ChatBody.model_validate(visit.body)
            messages = [message.for_template() for message in body.messages]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            reports = body.top_logprobs if body.logprobs else None
            return prompt, body, {"max_tokens": body.max_completion_tokens, "logprobs": reports}
        body = CompletionBody.model_validate(visit.body)
        (prompt,) = body.prompts
        reports = {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}
        return prompt, body, {"max_tokens": body.max_tokens, **reports}

    def _choice(self, request: Request, body: Body) -> Choice:
        reports = [*request.prompt_logprobs, *request.logprobs]
        echoes = isinstance(body, CompletionBody) and body.echo
        return Choice(
            (self.tokenizer.decode(request.prompt) if echoes else "") + request.shown,
            request.finish_reason,
            request.depths[len(request.prompt) :] if body.return_depths else [],
            [None if report is None else report.token for report in reports],
        )

    def _engine(self, model: MoRForCausalLM) -> Engine:
        return Engine(model, self.tokenizer, EngineOptions(lanes=1, prefix_cache=False))


def _difference(alone: list[Choice], answer: Answer) -> str | None:
    has_left = answer.outcome == "left"
    if not has_left and len(answer.choices) != len(alone):
        return f"{len(answer.choices)} choices instead of {len(alone)}"
    for own, served in zip(alone, answer.choices, strict=False):
        pairs = [("text", own.text, served["text"]), ("depths", own.depths, served["depths"])]
        for name, wanted, found in pairs:
            if (wanted[: len(found)] if has_left else wanted) != found:
                return f"{name} is {found!r} instead of {wanted!r}"
        if not has_left and own.finish_reason != served["finish_reason"]:
            return f"finish_reason is {served['finish_reason']} instead of {own.finish_reason}"
        if not has_left and len(own.token_logprobs) != len(served["token_logprobs"]):
            return f"{len(served['token_logprobs'])} log-probabilities instead of {len(own.token_logprobs)}"
        for wanted, found in zip(own.token_logprobs, served["token_logprobs"], strict=False):
            if (wanted is None) != (found is None) or (found is not None and abs(wanted - found) > LOGPROB):
                return f"a log-probability is {found} instead of {wanted}"
    return None


def _changed(model: MoRForCausalLM, seed: int) -> MoRForCausalLM:
    """A copy with other rounding."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.0 + ROUNDING * torch.randn(parameter.shape, generator=generator)
    return model
