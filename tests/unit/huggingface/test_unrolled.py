"""Models without routing as plain Llamas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import VOCAB, pair, random_ids, training_logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mor_megatron.huggingface.export import to_model, write
from mor_megatron.huggingface.unrolled import to_llama, unrolling

pytestmark = pytest.mark.usefixtures("process_group")

WHOLE = {"vanilla": 8, "vanilla_bias": 8, "recursive": 8, "recursive_bias": 8, "recursive_relaxed": 8}
"""Kind of model -> layers of its Llama."""


def weights_of(name: str) -> dict[str, torch.Tensor]:
    state = pair(name)[0].state_dict()
    return {
        key: tensor[:VOCAB] if "word_embeddings" in key else tensor
        for key, tensor in state.items()
        if not key.endswith("_extra_state")
    }


@pytest.mark.parametrize(
    ("name", "depth", "count"), [*((n, None, c) for n, c in WHOLE.items()), ("recursive_relaxed", 2, 6)]
)
def test_a_llama_computes_the_same(name: str, depth: int | None, count: int, tmp_path: Path):
    model, ids = pair(name)[0], random_ids()
    llama = to_llama(weights_of(name), model.run_config, depth=depth)
    line = unrolling(llama, model.run_config)
    assert line.startswith(f"LlamaForCausalLM of {count} layers")
    assert ("copies of the 4 that were trained" in line) == name.startswith("recursive")
    assert llama.generation_config.bos_token_id is None
    write(llama, None, tmp_path / "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert type(loaded) is LlamaForCausalLM
    assert len(loaded.model.layers) == count
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected, _ = training_logits(model, ids, **({} if depth is None else {"fixed_depth": depth}))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("expert", None, "routing=expert_choice .*without --as"),
        ("token", 2, "routing=token_choice .*without --as"),
        ("recursive_sharing", None, "kv-mode=sharing .*without --as"),
        ("recursive", 4, "depth=4 must be between 1 and num-recursions=3"),
    ],
)
def test_what_is_no_llama_is_refused(name: str, depth: int | None, message: str):
    with pytest.raises(ValueError, match=message):
        to_llama(weights_of(name), pair(name)[0].run_config, depth=depth)


def test_a_vector_of_recursions_is_refused():
    config = pair("recursive_relaxed")[0].run_config
    config = replace(config, recursion=replace(config.recursion, recursion_embedding=True))
    with pytest.raises(ValueError, match=r"recursion-embedding=True .*without --as"):
        to_llama(weights_of("recursive_relaxed"), config)


def test_one_recursion_of_shared_keys_is_a_llama():
    model, ids = pair("recursive_sharing")[0], random_ids()
    llama = to_llama(weights_of("recursive_sharing"), model.run_config, depth=1)
    expected, _ = training_logits(model, ids, fixed_depth=1)
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, expected, atol=1e-5, rtol=0)


def test_numbers_end_documents_as_in_training():
    """A run on ids below 63: 63 stands between documents, and before the first."""
    model = pair("vanilla")[0]
    data = replace(model.run_config.data, tokenizer_type="NullTokenizer", tokenizer_model="63")
    made = (weights_of("vanilla"), replace(model.run_config, data=data))
    for exported in (to_model(*made), to_llama(*made)):
        settings = exported.generation_config
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (63, 63, None)
        assert exported.config.eos_token_id == 63
        assert exported.generate(max_new_tokens=2, pad_token_id=0)[0, 0] == 63
