"""Many prompts at once, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.loading import encode, load_model
from mor_megatron.serving.engine import Engine
from mor_megatron.serving.options import EngineOptions
from mor_megatron.serving.request import Event, FinishReason, Logprob, Request, SamplingParams


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Generated ids, with the token that ended the sequence."""
    text: str
    """Their text, without what ended it."""
    depths: tuple[int, ...]
    """Recursions of each token of prompt and continuation; the last one's only with `last_depth`."""
    finish_reason: FinishReason
    logprobs: tuple[Logprob, ...]
    """Of the continuation, if asked for."""
    prompt_logprobs: tuple[Logprob | None, ...]
    """Of the prompt, if asked for; None for its first token."""

    @classmethod
    def of(cls, request: Request) -> Completion:
        """What a request that has ended came to."""
        names = {"tokens": "generated", "text": "shown"}
        values = {entry.name: getattr(request, names.get(entry.name, entry.name)) for entry in fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class LLM:
    """A model and its engine.

    Args:
        model: an export, a run's directory, or one checkpoint in it; or a model in memory.
        tokenizer: of a model in memory.
        dtype, device: of a model that is loaded; see `inference.loading.load_model`.
        options: fields of `EngineOptions`.
    Raises:
        ValueError: there is no model, or it or an option does not fit the engine.
    """

    def __init__(
        self,
        model: MoRForCausalLM | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: str = "fp32",
        device: str | None = None,
        **options,
    ):
        if not isinstance(model, MoRForCausalLM):
            model, tokenizer = load_model(model, dtype, device)
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, EngineOptions(**options))

    def generate(
        self,
        prompts: str | Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue all prompts; the results are in their order.

        Args:
            prompts: texts or ids of each, or one text by itself.
            params: of all prompts, or one for each.
            progress: show a bar on stderr.
        Raises:
            ValueError: a request does not fit the model or the engine; nothing is generated then.
        """
        return list(self.stream(prompts, params, progress))

    def stream(
        self,
        prompts: str | Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> Iterator[Completion]:
        """The results of `generate`, each as soon as it and those before it are there."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} values for {len(prompts)} prompts: give one, or one for each")
        size = self.engine.model.config.vocab_size
        ids = [encode(p, self.tokenizer, size) if isinstance(p, str) else p for p in prompts]
        open_requests: set[Request] = set()
        with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:

            def tell(event: Event) -> None:
                if event.finish_reason is not None:
                    open_requests.discard(event.request)
                    bar.update()

            requests = []
            try:
                for prompt, own in zip(ids, each, strict=True):
                    requests.append(self.engine.add(prompt, own, tell))
                open_requests.update(requests)
                for request in requests:
                    while request in open_requests:
                        self.engine.step()
                    yield Completion.of(request)
            finally:  # an error, or nobody wants the rest
                for request in requests:
                    self.engine.cancel(request)
                self.engine.drain()


__all__ = ["LLM", "Completion"]
