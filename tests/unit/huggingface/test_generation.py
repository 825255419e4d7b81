"""Decoding with the cache equals the full forward pass, for each sequence of any batch."""

from __future__ import annotations

import pytest
import torch
from pairs import DECODED, TOLERANCE, VOCAB, pair
from torch import Tensor

from mor_megatron.huggingface.attention_mor import Visibility
from mor_megatron.huggingface.cache_mor import CHUNK, MoRCache, Window
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.planning.accounting import kv_bytes_per_token

pytestmark = pytest.mark.usefixtures("process_group")

PROMPTS = (3, 9, 1, 7, 12, 5, 4)
NEW = 8
PAD = 0


@pytest.fixture(scope="module", params=DECODED)
def model(request, process_group) -> MoRForCausalLM:
    return pair(request.param)[1]


def prompts(left: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Seven unequal prompts, padded with an ordinary token; [7, 12] ids and mask, and each alone."""
    generator = torch.Generator().manual_seed(3)
    alone = [torch.randint(1, VOCAB, (length,), generator=generator) for length in PROMPTS]
    ids, mask = torch.full((7, 12), PAD), torch.zeros(7, 12, dtype=torch.int64)
    for b, prompt in enumerate(alone):
        place = slice(12 - len(prompt), None) if left else slice(None, len(prompt))
        ids[b, place], mask[b, place] = prompt, 1
    return ids, mask, alone


@torch.no_grad()
def decode(model: MoRForCausalLM, ids: Tensor, mask: Tensor, **options) -> tuple[Tensor, Tensor, MoRCache]:
    """Greedy decoding by hand: tokens [B, NEW], the logits they were chosen by, [B, NEW, V], and the cache."""
    output = model(ids, attention_mask=mask, use_cache=True, **options)
    tokens, logits = [], []
    for _ in range(NEW):
        logits.append(output.logits[:, -1])
        tokens.append(logits[-1].argmax(1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(tokens[-1], attention_mask=mask, cache=output.cache, **options)
    return torch.cat(tokens, 1), torch.stack(logits, 1), output.cache


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_cached_batch_equals_each_sequence_alone_without_cache(model: MoRForCausalLM, left: bool):
    ids, mask, alone = prompts(left)
    tokens, logits, cache = decode(model, ids, mask)
    for b, prompt in enumerate(alone):
        whole = torch.cat([prompt, tokens[b]])[None]
        with torch.no_grad():
            full = model(whole, use_cache=False)
        expected = full.logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[b], expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(expected.argmax(1), tokens[b])
        kept = cache.depths[b][cache.depths[b] >= 0]
        assert torch.equal(kept, full.depths[0])


def test_side_by_side_is_one_after_the_other(model: MoRForCausalLM, monkeypatch):
    """Ragged keys are copied side by side on accelerators, and read in place, sequence by sequence, on a processor."""
    ids, mask, _ = prompts(True)
    turns, each = [], Window.each
    monkeypatch.setattr(Window, "each", lambda self, buffer: turns.append(self.sequences) or each(self, buffer))
    expected = decode(model, ids, mask)
    assert tuple(range(7)) in turns
    monkeypatch.setattr(Visibility, "in_turn", False)
    tokens, logits, _ = decode(model, ids, mask)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_not_there(model: MoRForCausalLM, left: bool):
    """What stands at padding changes no bit of anything; real tokens of a padded batch are those of each sequence."""
    ids, mask, alone = prompts(left)
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
        other = model(ids.masked_fill(mask == 0, 17), attention_mask=mask)
        assert torch.equal(output.logits, other.logits)
        assert torch.equal(output.depths == -1, mask == 0)
        for b, prompt in enumerate(alone):
            expected = model(prompt[None]).logits[0]
            torch.testing.assert_close(output.logits[b][mask[b] == 1], expected, atol=TOLERANCE, rtol=0)


def test_earlier_logits_do_not_know_later_tokens(model: MoRForCausalLM):
    ids, _, _ = prompts(True)
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 5) % VOCAB
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=2e-6, rtol=0)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 2}], ids=str)
def test_fixed_depth_decodes(model: MoRForCausalLM, options: dict):
    if model.config.num_recursions < 2:
        with pytest.raises(ValueError, match="depth=2"):
            model(torch.tensor([[1]]), depth=2)
        return
    ids, mask, alone = prompts(True)
    tokens, logits, _ = decode(model, ids, mask, **options)
    with torch.no_grad():
        full = model(torch.cat([alone[3], tokens[3]])[None], **options).logits[0, len(alone[3]) - 1 : -1]
    torch.testing.assert_close(logits[3], full, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_generate_is_decoding_by_hand(model: MoRForCausalLM, left: bool):
    ids, mask, _ = prompts(left)
    tokens, _, _ = decode(model, ids, mask)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    uncached = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, use_cache=False
    )
    assert torch.equal(generated[:, 12:], tokens)
    assert torch.equal(uncached, generated)


def test_beams_and_sampling_with_and_without_cache(model: MoRForCausalLM):
    ids, mask, _ = prompts(True)
    for options in ({"num_beams": 3, "num_return_sequences": 2, "do_sample": False}, {"do_sample": True, "top_k": 8}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=5, pad_token_id=PAD, use_cache=use_cache, **options
                )
            )
        assert torch.equal(*results)


def test_prompt_lookup_rolls_the_cache_back(model: MoRForCausalLM):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize(("option", "value"), [("cache_implementation", "static"), ("assistant_early_exit", 2)])
def test_a_refused_option_leaves_the_model_as_it_was(option: str, value: str | int):
    model = pair("expert")[1]
    settings = model.config.to_dict()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=PAD, **{option: value})
    assert model.config.to_dict() == settings


def test_prefill_in_chunks_and_continuation(model: MoRForCausalLM):
    """A prompt given in pieces, and a cache handed to a second call of `generate`."""
    ids, mask, _ = prompts(True)
    options = {"do_sample": False, "pad_token_id": PAD}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, prefill_chunk_size=5, **options)
    assert torch.equal(chunked, expected)
    cache = MoRCache(model.config)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=3, cache=cache, **options)
    mask = torch.cat([mask, mask.new_ones(7, 3)], 1)
    second = model.generate(first, attention_mask=mask, max_new_tokens=NEW - 3, cache=cache, **options)
    assert torch.equal(second, expected)


def test_stored_rows_are_the_pairs_of_token_and_depth(model: MoRForCausalLM):
    ids, mask, _ = prompts(True)
    _, _, cache = decode(model, ids, mask)
    config, plan = model.config, model.config.plan
    tokens = [length + NEW for length in PROMPTS]
    passed = [[int((d > r).sum()) for d in cache.depths] for r in range(config.num_recursions)]
    expected_rows, row_bytes = 0, 2 * config.num_key_value_heads * config.head_dim * 4
    for use in plan.layers:
        if config.kv_mode == "sharing" and use.kv_source != use.index:
            continue
        expected_rows += sum(tokens) if use.recursion is None else sum(passed[use.recursion])
    assert cache.num_rows() == expected_rows
    layers = sum(1 for use in plan.layers if config.kv_mode != "sharing" or use.kv_source == use.index)
    spare = cache.nbytes() - expected_rows * row_bytes
    assert 0 <= spare <= layers * len(PROMPTS) * CHUNK * row_bytes
    if config.routing != "none":
        assert sum(passed[-1]) < sum(tokens), "the routers of this case stop no token"


def test_growing_moves_nothing_out_of_place(model: MoRForCausalLM):
    """Decode past the spare rows of a segment."""
    with torch.no_grad():
        ids = torch.randint(1, VOCAB, (2, 4 + CHUNK + 6), generator=torch.Generator().manual_seed(1))
        output = model(ids[:, :4], use_cache=True)
        logits = [output.logits]
        for column in range(4, ids.shape[1]):
            output = model(ids[:, column : column + 1], cache=output.cache)
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "ratio"), [("expert", 2 / 3), ("expert_sharing", 1 / 3), ("recursive_sharing", 1 / 3)]
)
def test_share_of_the_keys_that_a_vanilla_model_holds(name: str, ratio: float, process_group):
    """At the capacities of training: (Nr+1)/(2Nr) of the block's rows, and 1/Nr with sharing."""
    model, export = pair(name)
    ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = export(ids, selection="capacity", use_cache=True).cache
    ends, block = 2 * ids.numel(), 6 * ids.numel()
    assert cache.num_rows() - ends == ratio * block
    row_bytes = 2 * export.config.num_key_value_heads * export.config.head_dim * 4
    planned = kv_bytes_per_token(model.run_config, bytes_per_number=4)
    assert cache.num_rows() * row_bytes == pytest.approx(ids.numel() * planned)
