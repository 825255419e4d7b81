"""Arguments of the exported model other than tokens, and outputs other than logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pairs import DECODED, ROUTED, TOLERANCE, VOCAB, pair, random_ids
from torch import Tensor
from transformers import DataCollatorWithFlattening

from mor_megatron.huggingface.columns_mor import predictable
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM, MoRForSequenceClassification, MoRModel
from mor_megatron.huggingface.versions_mor import cache_name

pytestmark = pytest.mark.usefixtures("process_group")

LENGTHS = (5, 11, 3, 8)


def padded(left: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Unequal sequences, [4, 11] ids and mask, and each alone."""
    alone = [ids[:length] for ids, length in zip(random_ids(4), LENGTHS, strict=True)]
    ids, mask = torch.zeros(4, 11, dtype=torch.int64), torch.zeros(4, 11, dtype=torch.int64)
    for b, tokens in enumerate(alone):
        place = slice(11 - len(tokens), None) if left else slice(None, len(tokens))
        ids[b, place], mask[b, place] = tokens, 1
    return ids, mask, alone


@pytest.mark.parametrize("name", ["vanilla", "expert", "token"])
def test_labels_have_one_loss_on_either_side_of_padding(name: str):
    """That of each sequence alone; the first token of one is predicted from nothing."""
    _, export = pair(name)
    losses = []
    with torch.no_grad():
        for left in (True, False):
            ids, mask, alone = padded(left)
            losses.append(export(ids, attention_mask=mask, labels=ids).loss)
        sums = [F.cross_entropy(export(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum") for tokens in alone]
    expected = sum(sums) / sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(torch.stack(losses), expected.expand(2), atol=1e-6, rtol=0)


def test_labels_after_a_cache():
    """The first new token of a sequence is not predicted in this call, whatever stands before it."""
    real = torch.tensor([[False, True, True], [True, True, False]])
    labels = torch.arange(6).view(2, 3)
    assert predictable(labels, real, None).tolist() == [[-100, -100, 2], [-100, 4, -100]]


@pytest.mark.parametrize("name", DECODED)
def test_packed_rows_are_the_sequences_alone(name: str):
    """As `DataCollatorWithFlattening` makes them: logits, depths and, in training mode, loss and gradient."""
    _, export = pair(name)
    _, _, alone = padded(True)
    batch = DataCollatorWithFlattening()([{"input_ids": tokens.tolist()} for tokens in alone])
    with torch.no_grad():
        together, single = export(**batch), [export(tokens[None]) for tokens in alone]
    expected = torch.cat([output.logits[0] for output in single])
    torch.testing.assert_close(together.logits[0], expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(together.depths[0], torch.cat([output.depths[0] for output in single]))
    assert together.cache is None
    ids, mask, _ = padded(False)
    losses, gradients = [], []
    for inputs in (batch, {"input_ids": ids, "attention_mask": mask, "labels": ids}):
        export.zero_grad()
        losses.append(export.train()(**inputs).loss)
        losses[-1].backward()
        gradients.append(export.model.embed_tokens.weight.grad.clone())
    export.eval().zero_grad()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=TOLERANCE, rtol=0)


def test_position_ids_that_agree_change_nothing_and_others_are_refused():
    _, export = pair("expert")
    ids, mask, _ = padded(True)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        expected = export(ids, attention_mask=mask, use_cache=True)
        given = export(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        assert torch.equal(given.logits, expected.logits)
        more = {"attention_mask": F.pad(mask, (0, 1), value=1), "cache": given.cache}
        nexts = positions[:, -1:] + 1
        for wrong in (positions + 1, positions.flip(1), torch.arange(11)[None]):
            with pytest.raises(ValueError, match="position_ids count neither"):
                export(ids, attention_mask=mask, position_ids=wrong)
        with pytest.raises(ValueError, match="position_ids count neither"):
            export(ids[:, :1], position_ids=nexts * 0, **more)
        export(ids[:, :1], position_ids=nexts, **more)
        with pytest.raises(ValueError, match="cannot be continued: use_cache=False"):
            export(ids[:1], position_ids=(torch.arange(11) % 6)[None], use_cache=True)


@pytest.mark.parametrize("name", ["recursive_sharing", "sequence_sharing", "expert", "token_cycle"])
@pytest.mark.parametrize("depth", [None, 1])
def test_hidden_states_are_what_each_position_reads(name: str, depth: int | None):
    """Compared with what the layers were called with, and with the exit state where a token has left."""
    _, export = pair(name)
    ids, mask, _ = padded(True)
    calls: list[Tensor] = []
    layers = export.model.layers
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append(given[0])) for layer in layers]
    with torch.no_grad():
        output = export(ids, attention_mask=mask, depth=depth, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    config, real = export.config, mask.bool()
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert {states.shape for states in output.hidden_states} == {(4, 11, config.hidden_size)}
    torch.testing.assert_close(export.lm_head(output.hidden_states[-1]), output.logits, atol=0, rtol=0)
    depths = output.depths[real]
    at = [states[real] for states in output.hidden_states]
    assert torch.equal(at[0], export.model.embed_tokens(ids)[real])
    for use in config.plan.layers:
        here = torch.ones_like(depths, dtype=torch.bool) if use.recursion is None else depths > use.recursion
        if here.any():
            assert torch.equal(at[use.index][here], calls.pop(0))
        if name == "expert" and use.recursion is not None:
            assert torch.equal(at[use.index][~here], at[-2][~here])  # what the last layer reads
    assert calls == []


@pytest.mark.parametrize("head", [MoRForCausalLM, MoRModel, MoRForSequenceClassification])
def test_settings_of_the_configuration_are_defaults_of_calls(head):
    config = copy.deepcopy(pair("expert")[1].config)
    config.num_labels = 3
    before = config.to_dict()
    model, ids = head(config).eval(), random_ids()
    assert config.to_dict() == before
    with torch.no_grad():
        plain = model(ids)
        assert plain.get("hidden_states") is None
        parts = model(ids, return_dict=False)
        assert isinstance(parts, tuple)
        assert torch.equal(parts[0], plain[0])
        model.config.output_hidden_states, model.config.return_dict = True, False
        assert len(model(ids)[2 if head is not MoRForSequenceClassification else 1]) == 9
        assert model(ids, return_dict=True, output_hidden_states=False).get("hidden_states") is None


def test_calls_leave_the_configuration_alone():
    _, export = pair("expert")
    ids, before = random_ids(), copy.deepcopy(export.config.to_dict())
    export.train()(ids, labels=ids)
    export.eval().generate(ids, max_new_tokens=2, router_threshold=0.3, do_sample=False, num_beams=2)
    assert export.config.to_dict() == before


def test_a_threshold_beside_a_depth_is_refused():
    """It would decide nothing, wherever the depth comes from."""
    export = copy.deepcopy(pair("expert")[1]).eval()
    with pytest.raises(ValueError, match=r"router_threshold=0\.3 decides nothing where depth=1 does: leave one out"):
        export(random_ids(), depth=1, router_threshold=0.3)
    export.config.depth = 2
    with pytest.raises(ValueError, match="where depth=2 does"):
        export(random_ids(), router_threshold=0.5)
    export.config.router_threshold = 0.3  # the model's own threshold stays in its configuration, unused
    export(random_ids())


@pytest.mark.parametrize("name", ["expert", "token"])
def test_sequences_are_classified_at_their_last_token(name: str):
    config = copy.deepcopy(pair(name)[1].config)
    config.num_labels, config.pad_token_id = 3, VOCAB - 1
    model = MoRForSequenceClassification(config).eval()
    classes = torch.tensor([0, 2, 1, 1])
    _, _, alone = padded(True)
    alone = [tokens.clamp(max=VOCAB - 2) for tokens in alone]
    with torch.no_grad():
        expected = torch.cat([model(tokens[None]).logits for tokens in alone])
        for left in (True, False):
            ids, mask, _ = padded(left)
            ids = ids.clamp(max=VOCAB - 2).masked_fill(mask == 0, config.pad_token_id)
            output = model(ids, attention_mask=mask, labels=classes)
            assert output.logits.shape == (4, 3)
            torch.testing.assert_close(output.logits, expected, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(output.loss, F.cross_entropy(expected, classes), atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(model(ids).logits, expected, atol=TOLERANCE, rtol=0)
    assert config.problem_type is None
    output = model.train()(ids, attention_mask=mask, labels=classes)
    output.loss.backward()
    torch.testing.assert_close(output.loss - output.router_loss, F.cross_entropy(output.logits, classes))
    assert all(p.grad is not None for p in model.parameters())


def test_no_cache_with_gradient_checkpointing():
    export = copy.deepcopy(pair("expert")[1])
    ids = random_ids()
    export.train().gradient_checkpointing_enable()
    output = export(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert output.cache is None
    with torch.no_grad():
        assert export(ids, use_cache=True).cache is not None


@pytest.mark.parametrize("name", ["token_loss_free", "expert"])
def test_weights_begin_after_construction_on_the_meta_device(name: str):
    config = pair(name)[1].config
    with torch.device("meta"):
        model = MoRForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    assert torch.isfinite(model(random_ids()).logits).all()
    assert all(not buffer.any() for buffer in model.buffers())


REFUSED = {
    "generate_batch": lambda model, ids: model.generate_batch(inputs=ids.tolist()),
    "vLLM": lambda model, ids: model.is_backend_compatible(),
    "torch.jit": lambda model, ids: torch.jit.trace(lambda x: model(x).logits, ids),
    "torch.export": lambda model, ids: torch.export.export(model, (ids,)),
    "ONNX": lambda model, ids: torch.onnx.export(model, (ids,), dynamo=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_a_routed_model_says_what_can(name: str):
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*use generate\(\) with a padded batch[^\n]*$"):
        REFUSED[name](pair("expert")[1], random_ids())


@pytest.mark.parametrize("name", ROUTED)
def test_routers_stay_in_fp32(name: str):
    """In bf16, under autocast, and with half of everything: their logits are those of fp32 from the same input."""
    _, export = pair(name)
    router = next(m for n, m in export.named_modules() if type(m).__name__ == "Router")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = router(hidden.float())
        assert torch.equal(router(hidden), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(hidden), expected)
        assert copy.deepcopy(router).bfloat16()(hidden).dtype == torch.float32


def test_versions_of_transformers():
    with pytest.raises(
        ImportError, match=r"^MoR models run with transformers 5\.0 to 5\.24, and this is 4\.57\.6: .*$"
    ):
        cache_name("4.57.6")
    assert [cache_name(version) for version in ("5.0.0", "5.12.1", "5.23.0")] == ["past_key_values"] * 3
    assert cache_name("5.24.0") == cache_name("5.24.1") == "cache"
