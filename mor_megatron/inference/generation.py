"""Generation of one text as a stream of tokens with their depths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from mor_megatron.huggingface.cache_mor import MoRCache
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    depth: int
    """Number of recursions that it took."""
    generated: bool


class _Stream(BaseStreamer):
    """Passes each token on once its depth is known, which is when the model has processed it."""

    def __init__(self, cache: MoRCache, show: Callable[[Token], None]):
        self.cache, self.show = cache, show
        self.waiting: list[tuple[int, bool]] = []
        self.shown = 0

    def put(self, value: torch.Tensor) -> None:
        is_prompt = self.shown == 0 and not self.waiting
        self.flush()
        self.waiting += [(token, not is_prompt) for token in value.flatten().tolist()]

    def end(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Pass on the tokens that are in the cache."""
        count = min(len(self.waiting), self.cache.get_seq_length() - self.shown)
        if count > 0:
            depths = self.cache.depths[0, self.shown : self.shown + count].tolist()
            for (token, generated), depth in zip(self.waiting[:count], depths, strict=True):
                self.show(Token(token, depth, generated))
            self.waiting, self.shown = self.waiting[count:], self.shown + count


@torch.no_grad()
def generate(
    model: MoRForCausalLM,
    prompt: list[int],
    max_new_tokens: int,
    show: Callable[[Token], None],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    depth: int | None = None,
    router_threshold: float | None = None,
) -> MoRCache:
    """Continue a text. `show` receives every token of prompt and continuation as soon as its depth is known.

    Args:
        temperature: 0 takes the most likely token; above 0, tokens are sampled.
        top_k, top_p: sample from the k most likely tokens; from the most likely tokens of total probability p.
        depth, router_threshold: see `MoRForCausalLM.forward`.
    Returns:
        Keys and values of the whole text.
    Raises:
        ValueError: a setting does not apply.
    """
    options = sampling(temperature, top_k, top_p)
    routing_options = {"depth": depth, "router_threshold": router_threshold}
    routing_options = {name: value for name, value in routing_options.items() if value is not None}
    cache = MoRCache(model.config)
    stream = _Stream(cache, show)
    ids = torch.tensor([prompt], device=model.device)
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        cache=cache,
        streamer=stream,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **options,
        **routing_options,
    )
    model(tokens[:, cache.get_seq_length() :], cache=cache, **routing_options)  # the cache lacks the last token
    stream.flush()
    return cache


def sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, bool | float | int]:
    """Sampling arguments of transformers' `generate`; see `generate` for their meaning.

    Raises:
        ValueError: a setting does not apply.
    """
    if temperature < 0.0:
        raise ValueError(f"temperature={temperature} must be 0 (the most likely token) or more")
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise ValueError("top-k and top-p restrict sampling: give a --temperature above 0")
    if temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
