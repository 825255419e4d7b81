"""Self-speculation leaves greedy decoding as it is."""

from __future__ import annotations

import pytest
from serving_models import expected, model_of
from speculate import decode

PROMPTS = ((3, 1, 4, 1, 5), (9,), (2, 6, 5, 3, 5, 8, 9, 7, 9))


@pytest.mark.parametrize("kind", ["recursive", "expert", "expert_sharing", "token"])
def test_speculation_does_not_change_tokens(kind: str):
    done = decode(model_of(kind), [list(prompt) for prompt in PROMPTS], 12, drafts=3, spoil=0.3)
    assert done.tokens == [list(e.tokens) for e in expected(kind, PROMPTS, 12)]
    assert 0 < done.accepted.total() < done.drafted.total()
