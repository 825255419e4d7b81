"""Decoding on an accelerator gives the processor's tokens, waits once a token, and shows attention few shapes.

The accelerator is a pretended one (accelerator.py). Waits of transformers' own loop are not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from accelerator import Accelerator
from pairs import VOCAB, pair
from torch import Tensor
from worker_pool import WorkerPool

from mor_megatron.config.schema import Config
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.huggingface import cache_mor
from mor_megatron.huggingface.attention_mor import Visibility
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

PROMPTS = (3, 9, 1, 7)
STEP = 8
"""Rows of a segment, so that segments grow during the test."""
TOKENS = 12
KINDS = ["recursive_sharing", "expert", "expert_sharing_update", "token"]
KINDS += [pytest.param(name, marks=pytest.mark.slow) for name in ("vanilla", "token_sharing_update")]


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    """One that has the accelerator, which no other test should."""
    pool = WorkerPool(1)
    yield pool
    pool.stop()


def prompts(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    longest = max(PROMPTS[:count])
    ids, mask = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, longest, dtype=torch.int64)
    for b, length in enumerate(PROMPTS[:count]):
        ids[b, longest - length :] = torch.randint(1, VOCAB, (length,), generator=generator)
        mask[b, longest - length :] = 1
    return ids, mask


def generate(model: MoRForCausalLM, ids: Tensor, mask: Tensor, count: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Tokens, and how deep the model went with each that it has read."""
    cache = cache_mor.MoRCache(model.config)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "cache": cache}
    return model.generate(ids, attention_mask=mask, **options), cache.depths


def decoded(name: str, count: int) -> tuple[int, set[tuple]]:
    """How often the model waited for TOKENS - 2 tokens, and the shapes of the keys that it saw; tokens are compared."""
    accelerator = Accelerator()
    initialize_distributed(Config())
    _, model = pair(name)
    ids, mask = prompts(count)
    expected = generate(model, ids, mask)
    model, shapes, waits = copy.deepcopy(model), set(), []
    exchange = Visibility.exchange

    def noted(self, *arguments):
        seen = exchange(self, *arguments)
        if self.past:
            shapes.update(keys.shape for keys, _ in seen)
        return seen

    with accelerator, patch.object(cache_mor, "STEP", STEP), patch.object(Visibility, "exchange", noted):
        accelerator.move(model)
        for tokens in (2, TOKENS):
            with accelerator.counting() as found:
                got = generate(model, accelerator.put(ids), accelerator.put(mask), tokens)
            waits.append(sum(not wait.startswith("elsewhere") for wait in found))
        for x, y in zip(got, expected, strict=True):
            assert x.tolist() == y.tolist()
    return waits[1] - waits[0], shapes


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_waited_for_once_a_token(process, name):
    ((waits, shapes),) = process.run(1, "one", decoded, name, len(PROMPTS))
    kind = name.partition("_")[0]
    assert waits == (0 if kind in ("vanilla", "recursive") else TOKENS - 2)
    longest = max(PROMPTS) + TOKENS
    assert {shape[2] % STEP for shape in shapes} == {0}
    assert len(shapes) <= (longest // STEP + 1) * (len(PROMPTS) if kind == "token" else 1), shapes


def test_one_sequence_is_waited_for_where_it_may_leave(process):
    ((waits, _),) = process.run(1, "one", decoded, "expert", 1)
    assert TOKENS - 2 < waits <= 2 * (TOKENS - 2)
