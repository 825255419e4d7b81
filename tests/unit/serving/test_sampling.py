"""Sampling follows its parameters, and one request's samples do not depend on others."""

from __future__ import annotations

import math

import pytest
import torch
from serving_models import VOCAB, model_of
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mor_megatron.inference.loading import StreamDecoder
from mor_megatron.serving import LLM, Request, SamplingParams
from mor_megatron.serving.sampling import logprobs_of, sample
from mor_megatron.serving.text import Text

LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 2.0


def request(prompt=(1,), generated=(), **params) -> Request:
    made = Request("0", list(prompt), SamplingParams(**params), None, 0.5)
    made.tokens += generated
    return made


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.6, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(0.6), TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=["top-k", "top-p", "min-p", "all"],  # an object's text would differ between processes
)
def test_samples_have_the_distribution_of_transformers(params: dict, warpers: list):
    count = 1000
    wanted = LOGITS.unsqueeze(0)
    for warper in warpers:
        wanted = warper(None, wanted)
    wanted = wanted.softmax(1)[0]
    rows = [request(seed=i, **{"temperature": 1.0, **params}) for i in range(count)]
    tokens = torch.tensor(sample(LOGITS.expand(count, -1), rows, set()))
    found = torch.bincount(tokens, minlength=VOCAB) / count
    assert not (found > 0)[wanted == 0].any()
    assert (found - wanted).abs().max() < 5 * math.sqrt(0.25 / count)  # five standard deviations


def test_penalties():
    row = request([3, 4, 4], [5, 5, 6], repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    wanted = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([row.tokens]), LOGITS.clone()[None])[0]
    wanted[5] -= 0.5 + 2 * 0.25
    wanted[6] -= 0.5 + 0.25
    best = wanted.argsort(descending=True)
    barred = request([3, 4, 4], [5, 5, 6], repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25,
                     min_tokens=4, stop_token_ids=[int(best[0])])  # fmt: skip
    logits = LOGITS.repeat(3, 1)
    assert sample(logits, [row, barred, request()], {int(best[1])}) == [best[0], best[2], LOGITS.argmax()]
    assert torch.equal(logits, LOGITS.repeat(3, 1))


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"min_tokens": 10**30}, LOGITS.argmax()),  # the model has no end to put off
        ({"temperature": 1e-300}, LOGITS.argmax()),
        ({"temperature": 1.0, "top_k": 10**400, "top_p": 0.0}, LOGITS.argmax()),
    ],
    ids=["min-tokens", "temperature", "top-k"],
)
def test_extreme_parameters(params: dict, wanted: torch.Tensor):
    assert sample(LOGITS[None], [request(seed=1, **params)], set()) == [wanted]


def test_samples_do_not_depend_on_what_runs_beside_them():
    prompts, params = (
        [[1, 2, 3], [4], [5, 6]],
        [SamplingParams(max_tokens=8, temperature=1.2, seed=s) for s in (7, 8, 7)],
    )
    together = LLM(model_of("expert"), lanes=3, turn_at=3).generate(prompts, params)
    for prompt, own, done in zip(prompts, params, together, strict=True):
        (alone,) = LLM(model_of("expert"), lanes=1, chunk=2).generate([prompt], own)
        assert alone.tokens == done.tokens
    assert len({done.tokens for done in together}) == 3


def test_logprobs():
    reports = logprobs_of(LOGITS.repeat(3, 1), [4, 5, 6], [2, None, 0])
    wanted = LOGITS.log_softmax(0)
    assert reports[1] is None
    assert (reports[0].token, reports[2].token) == pytest.approx((wanted[4].item(), wanted[6].item()))
    assert list(reports[0].top) == wanted.topk(2).indices.tolist()
    assert reports[2].top == {}


def test_text_that_may_begin_a_stop_string_is_held_back():
    text = Text(StreamDecoder(None), ("2 3 4", "9 9"))
    assert [text.next(token) for token in (1, 2, 3, 5)] == ["1 ", "", "", "2 3 5 "]
    assert [text.next(token) for token in (2, 2, 3, 4)] == ["", "2 ", "", ""]
    assert (text.found, text.rest()) == ("2 3 4", "")
    unfinished = Text(StreamDecoder(None), ("2 3 4",))
    assert (unfinished.next(2), unfinished.rest(), unfinished.found) == ("", "2 ", None)
