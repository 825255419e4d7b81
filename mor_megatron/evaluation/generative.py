"""Generative tasks of lm-eval on the engine: a text that has ended makes room for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mor_megatron.serving import LLM, SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM


def generate_greedily(lm: HFLM, requests: Sequence[Instance], lanes: int, progress: bool) -> list[str] | None:
    """The texts of `lm.generate_until`.

    Args:
        lm: the harness's view of the model, which cuts prompts and texts.
        lanes: texts at a time.
        progress: show a bar on stderr.
    Returns:
        None: these requests sample, or use other settings of transformers, or the engine does not take the model.
    Raises:
        ValueError: a task wants more tokens than the model has positions.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    prompts, params = [], []
    for context, settings in (request.args for request in requests):
        settings = normalize_gen_kwargs(settings, lm.max_gen_toks)
        stop = handle_stop_sequences(settings.pop("until"), end)
        count = settings.pop("max_gen_toks")
        if settings.pop("do_sample") or settings.keys() - {"temperature"}:
            return None
        if count >= lm.max_length:
            raise ValueError(f"max_gen_toks={count} leaves no room for a prompt within {lm.max_length} positions")
        prompts.append(lm.tok_encode(context, left_truncate_len=lm.max_length - count))
        params.append(SamplingParams(max_tokens=count, stop=tuple(filter(None, stop))))
    longest = max(len(prompt) + own.max_tokens for prompt, own in zip(prompts, params, strict=True))
    try:
        llm = LLM(lm.model, lm.tokenizer, lanes=min(lanes, len(prompts)), max_length=longest)
    except ValueError:
        return None
    texts = []
    for request, own, done in zip(requests, params, llm.stream(prompts, params, progress), strict=True):
        texts.append(postprocess_generated_text(lm.tok_decode(done.tokens), list(own.stop), None))
        lm.cache_hook.add_partial("generate_until", request.args, texts[-1])
    return texts
