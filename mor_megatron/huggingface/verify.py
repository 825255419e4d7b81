"""Is an export the model that was trained? Logits and routing of both on real text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mor_megatron.config.schema import Config, ParallelConfig, TrainingConfig
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import MoRModel, build_model
from mor_megatron.model.stored_names import HEAD, stored_name
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.routing import ACTIVE

TOLERANCE = 1e-5
"""Of fp32 logits, relative to the largest one where that exceeds 1."""
EXTRACT = "\n\n".join(topics[name] for name in sorted(topics))
"""Real text that is everywhere: the Python language reference."""


class AnotherModelError(ValueError):
    """An export does not compute what the training stack computes."""


@dataclass(frozen=True)
class Comparison:
    """Of an export with the training stack, both in fp32 and selecting by threshold."""

    tokens: int
    largest_logit: float
    max_difference: float
    mean_difference: float
    same_argmax: float
    """Fraction of tokens with the same most likely successor."""
    same_depth: float
    """Fraction of tokens that pass equally many recursions."""

    @property
    def agrees(self) -> bool:
        return self.same_depth == 1.0 and self.max_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens of text: logits (up to {self.largest_logit:.3g}) differ by "
            f"{self.max_difference:.2e} at most and {self.mean_difference:.2e} on average; the same most likely token "
            f"at {100 * self.same_argmax:.2f} %, the same depth at {100 * self.same_depth:.2f} %"
        )


@torch.no_grad()
def compare(
    directory: str | Path,
    weights: Mapping[str, Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str = EXTRACT,
    sequences: int = 4,
    depth: int | None = None,
) -> Comparison:
    """Load an export as anybody would, and run it beside the training stack.

    Args:
        directory: of the export, its weights stored in fp32.
        weights, config: of the run, as in `export.export`.
        tokenizer: of the export; without one, the characters' numbers stand for ids.
        text: to run on; cut into `sequences` pieces of at most 512 tokens.
        depth: recursions of every token in the training stack; None lets the router decide.
    Raises:
        ValueError: the text is too short for one piece of two tokens each.
    """
    if tokenizer is not None:
        ids = tokenizer(text[: 20_000 * sequences], add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = [ord(character) % config.model.vocab_size for character in text]
    length = min(512, config.model.max_position_embeddings, len(ids) // sequences)
    if length < 2:
        raise ValueError(f"text of {len(ids)} tokens is too short: give at least {2 * sequences}")
    batch = torch.tensor(ids[: sequences * length]).view(sequences, length)
    context = RoutingContext(selection="threshold", trace={}, fixed_depth=depth)
    model = training_model(weights, config)
    ours = model(Batch(batch.to(next(model.parameters()).device)), context).float().cpu()
    exported = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    output = exported(batch)
    theirs = output.logits[..., : config.model.vocab_size]  # the export may have a row for padding
    depth = depths_of(context, config)
    difference = (ours - theirs).abs()
    return Comparison(
        tokens=batch.numel(),
        largest_logit=ours.abs().max().item(),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        same_argmax=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        same_depth=1.0 if depth is None else (depth.cpu() == output.depths).float().mean().item(),
    )


@torch.no_grad()
def training_model(weights: Mapping[str, Tensor], config: Config) -> MoRModel:
    """The training stack's model of these weights, on one rank, fp32, in evaluation mode."""
    alone = TrainingConfig(micro_batch_size=1, transformer_impl="local", attention_backend="sdpa", zero_stage=0)
    config = replace(config, training=alone, parallel=ParallelConfig())
    initialize_distributed(config)
    model = build_model(config)
    state = model.state_dict()
    for name, target in state.items():
        whole = weights.get(stored_name(name, state))
        if whole is not None and target is not None:
            rows = whole.shape[0] if name == HEAD or "word_embeddings" in name else target.shape[0]
            target[:rows].copy_(whole)
    return model.eval()


def depths_of(context: RoutingContext, config: Config) -> Tensor | None:
    """Recursions that each token passed, [B, S], from a pass with a trace; None without routing."""
    names = (ACTIVE.format(r) for r in range(config.recursion.num_recursions))
    active = [context.trace[name].int() for name in names if name in context.trace]
    return sum(active).t() if active else None
