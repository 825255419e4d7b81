"""The loss of distillation equals its definition in plain PyTorch, in chunks as in a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import random_ids, small_config
from torch import Tensor

from mor_megatron.data.batch import Batch
from mor_megatron.model.distillation import Distillation, Mixture, Predictions
from mor_megatron.model.loss import chunked_losses
from mor_megatron.model.mor_model import MoRModel, build_model

pytestmark = pytest.mark.usefixtures("process_group")

LENGTH, BATCH, WIDTH, TEACHER_WIDTH, VOCABULARY, PADDED = 10, 3, 16, 24, 61, 64
TOLERANCE = 1e-6  # of the largest: sums in another order


def defined(logits: Tensor, teacher: Tensor, labels: Tensor, mixture: Mixture) -> list[Tensor]:
    """Loss, cross entropy and divergence of each token from logits [.., V]."""
    cross_entropy = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    ours, theirs = ((x / mixture.temperature).log_softmax(-1) for x in (logits, teacher))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    weight = mixture.weight
    return [(1 - weight) * cross_entropy + weight * mixture.temperature**2 * divergence, cross_entropy, divergence]


def problem() -> tuple[Tensor, ...]:
    """Rows and head of the model and of its teacher, labels, and what each token weighs."""
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(LENGTH, BATCH, WIDTH, generator=draw), torch.randn(PADDED, WIDTH, generator=draw)
    theirs = (
        torch.randn(LENGTH, BATCH, TEACHER_WIDTH, generator=draw),
        torch.randn(PADDED, TEACHER_WIDTH, generator=draw),
    )
    counted = (torch.rand(LENGTH, BATCH, generator=draw) > 0.3).float()
    return *ours, *theirs, torch.randint(VOCABULARY, (LENGTH, BATCH), generator=draw), counted


@pytest.mark.parametrize("mixture", [Mixture(1.0, 0.5), Mixture(3.0, 0.2), Mixture(0.5, 1.0)], ids=str)
@pytest.mark.parametrize("chunk", [7, 100])
def test_equals_the_definition(chunk, mixture):
    hidden, weight, rows, head, labels, counted = problem()
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    teacher = Predictions(rows.flatten(0, 1), head, mixture)
    found = chunked_losses(*inputs, labels, counted, chunk, VOCABULARY, False, teacher)
    (3.0 * (found[0] * counted).sum(dtype=torch.float64)).backward()

    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    theirs = (rows.double() @ head.double().t())[..., :VOCABULARY]
    expected = defined((exact[0] @ exact[1].t())[..., :VOCABULARY], theirs, labels, mixture)
    (3.0 * (expected[0] * counted).sum()).backward()
    pairs = [*zip(found, expected, strict=True), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE * b.abs().max().item())


def test_of_itself_a_model_learns_nothing():
    hidden, weight, _, _, labels, counted = problem()
    ours = hidden.requires_grad_()
    teacher = Predictions(hidden.detach().flatten(0, 1), weight, Mixture(2.0, 1.0))
    found = chunked_losses(ours, weight, labels, counted, 7, VOCABULARY, False, teacher)
    (found[0] * counted).sum(dtype=torch.float64).backward()
    assert not found[2].any()
    assert not found[0].any()
    assert not ours.grad.any()


def teacher_of(width: int) -> MoRModel:
    return build_model(small_config("recursive", hidden_size=width, vocab_size=VOCABULARY)).eval().requires_grad_(False)


def test_in_a_model():
    """Of a batch with a mask and documents; in evaluation the loss is the plain one, bit for bit."""
    config = small_config("expert", vocab_size=VOCABULARY)
    config = replace(config, training=replace(config.training, loss_chunk_rows=40))
    model, teacher, mixture = build_model(config), teacher_of(16), Mixture(2.0, 0.3)
    ids = random_ids() % VOCABULARY
    documents = (torch.arange(ids.shape[1]) >= 11).long().expand_as(ids)
    batch = Batch(ids, ids.roll(-1, dims=1), loss_mask=(ids > 9).float(), document_ids=documents)
    unlabelled = replace(batch, labels=None)
    plain, logits = model(batch), model(unlabelled)
    model.distillation = Distillation(teacher, mixture)
    found = model(batch)
    expected = defined(logits, teacher(unlabelled), batch.labels, mixture)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert torch.equal(found[1], plain) or (found[1] - plain).abs().max() < 1e-6
    assert not any(name.startswith("distillation") for name, _ in model.named_parameters())
    evaluated = model.eval()(batch)
    model.distillation = None
    assert torch.equal(evaluated, model(batch))
