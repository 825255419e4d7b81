"""Continuations of many prompts, several at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mor_megatron.data.planning import plan
from mor_megatron.data.sources import Broken, describe, read
from mor_megatron.huggingface.cache_mor import MoRCache
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.generation import sampling

logger = logging.getLogger(__name__)

PROMPT = "prompt"
"""Field of a record that contains the prompt."""


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt."""

    tokens: tuple[int, ...]
    """Generated ids, without the token that ended the sequence."""
    depths: tuple[int, ...]
    """Number of recursions that each token took."""
    is_finished: bool
    """Whether the model ended the sequence itself."""


def read_prompts(path: Path) -> list[str]:
    """Read prompts: the lines of a text, or the field `prompt` of records (JSON lines or parquet; also compressed).

    The prompt of a record may be empty. Blank lines of a text are skipped, with a notice.

    Raises:
        ValueError: the file cannot be read, a record is broken, or there is no prompt.
    """
    if path.suffix in (".txt", ".text", ".md"):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        prompts = [line for line in lines if line.strip()]
        if len(prompts) < len(lines):
            logger.warning(f"{path}: skipped {len(lines) - len(prompts)} blank lines of {len(lines)}")
    else:
        records = [record for part in plan([str(path)], keys=(PROMPT,)) for record in read(part)]
        broken = [record for record in records if isinstance(record, Broken)]
        if broken:
            raise ValueError(f"{describe(broken[:1])[0]}: correct it, or remove it")
        prompts = [record.texts[0] for record in records]
    if not prompts:
        raise ValueError(f"prompts={path} contains no prompt: give one per line, or records with the field {PROMPT!r}")
    return prompts


def generate_all(
    model: MoRForCausalLM,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    depth: int | None = None,
    router_threshold: float | None = None,
) -> Iterator[Continuation]:
    """Continue all prompts, in order. Without sampling, the results do not depend on how prompts are batched.

    Other arguments are those of `generate`.

    Raises:
        ValueError: a setting does not apply.
    """
    options = sampling(temperature, top_k, top_p)
    routing_options = {"depth": depth, "router_threshold": router_threshold}
    routing_options = {name: value for name, value in routing_options.items() if value is not None}
    for start in range(0, len(prompts), batch_size):
        yield from _generate(
            model, prompts[start : start + batch_size], max_new_tokens, options | routing_options, routing_options
        )


@torch.no_grad()
def _generate(
    model: MoRForCausalLM, prompts: Sequence[list[int]], max_new_tokens: int, options: dict, routing_options: dict
) -> Iterator[Continuation]:
    longest = max(map(len, prompts))
    padding = model.generation_config.pad_token_id or 0
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = (torch.tensor(x, device=model.device) for x in (rows, mask))
    cache = MoRCache(model.config)
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, cache=cache, pad_token_id=padding, **options
    )
    model(tokens[:, cache.get_seq_length() :], cache=cache, **routing_options)  # the cache lacks the last tokens
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    for row, depths in zip(tokens[:, longest:].tolist(), cache.depths[:, longest:].tolist(), strict=True):
        count = next((i for i, token in enumerate(row) if token in ends), None)
        yield Continuation(tuple(row[:count]), tuple(depths[:count]), count is not None)
