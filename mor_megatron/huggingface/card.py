"""The model card of an export: what it is, how it was trained, how to run it. Nothing about where or on what."""

from __future__ import annotations

from transformers import LlamaForCausalLM, PreTrainedModel

from mor_megatron.huggingface.export import Checkpoint
from mor_megatron.huggingface.verify import AnotherModelError, Comparison
from mor_megatron.planning.accounting import (
    layer_parameters,
    recursion_embedding_parameters,
    relaxation_parameters,
)

_MOR = "A Transformer that runs a shared block of layers several times (arXiv 2507.10524)."
_LLAMA = (
    "A Llama, unrolled from the model that was trained: where that ran a layer several times (arXiv 2507.10524), it is "
    "stored as often."
)
_SPELLED = (
    "The tokenizer takes the characters of a special token in a text for the token. In training they were text, as "
    "with `tokenizer(text, split_special_tokens=True)`."
)
_HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---"""
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})
model = AutoModelForCausalLM.from_pretrained(DIRECTORY{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def write_card(model: PreTrainedModel, checkpoint: Checkpoint, verified: Comparison | None) -> str:
    """Text of README.md.

    Args:
        model: the export; a Llama where the model was unrolled into one.
        checkpoint: what it was made of.
        verified: of this export; None if it was not compared.
    Raises:
        AnotherModelError: the comparison shows another model than was trained.
    """
    if verified is not None and not verified.agrees:
        raise AnotherModelError(f"the export is not the model that was trained: {verified}")
    config, run = model.config, checkpoint.config
    recursion, plan = run.recursion, run.plan
    stored = sum(p.numel() for p in model.parameters())
    own = plan.block_size * relaxation_parameters(run) + recursion_embedding_parameters(run)
    positions, trained = len(model.model.layers), plan.num_physical_layers
    is_llama = isinstance(model, LlamaForCausalLM)
    if is_llama:
        parameters = f"{stored:,} stored"
        layers = f"{positions}, copies of {trained} trained ones" if positions > trained else f"{positions}"
    else:
        unrolled = stored - own + layer_parameters(run) * (len(plan.layers) - trained)
        parameters = f"{stored:,} stored; {unrolled:,} if no layer were shared"
        layers = f"{len(plan.layers)} positions on {trained} stored layers"
    facts = {
        "parameters": parameters,
        "layers": layers,
        "recursions": f"{plan.num_recursions} ({plan.strategy})" if plan.num_recursions > 1 else "1",
        **({"recursions differ by": f"{recursion.differences}: {own:,} parameters"} if own else {}),
        "routing": run.routing_method.about,
        "keys and values": recursion.kv_mode,
        "width, feed-forward, heads, key/value heads": (
            f"{config.hidden_size}, {config.intermediate_size}, {config.num_attention_heads}, "
            f"{config.num_key_value_heads}"
        ),
        "vocabulary, longest sequence": f"{run.model.vocab_size:,}, {config.max_position_embeddings:,}",
        **_training(checkpoint),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    parts = [
        _HEADER.format(tags="llama" if is_llama else "mor, recursive"),
        "# Language model" if is_llama else "# Mixture-of-Recursions language model",
        _LLAMA if is_llama else _MOR,
        f"| | |\n|---|---|\n{table}",
        "## Use",
        _USE.rstrip().format(trust="" if is_llama else ", trust_remote_code=True"),
        "" if is_llama else _advice(config),
        _SPELLED if run.data.tokenizer_type == "SentencePieceTokenizer" else "",
    ]
    if verified is not None:
        parts += ["## Verified", f"Against the training code, in fp32, on {verified}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(checkpoint: Checkpoint) -> dict[str, str]:
    """Facts of the run."""
    progress, run = checkpoint.manifest.progress, checkpoint.config
    if progress["iteration"] == 0:
        return {"trained on": "nothing since it was imported"}
    return {
        "trained on": f"{progress['consumed_samples'] * run.data.seq_length:,} tokens in "
        f"{progress['iteration']:,} iterations",
        "global batch": f"{run.training.global_batch_size:,} sequences of {run.data.seq_length:,} tokens",
        "optimizer": (
            f"{checkpoint.manifest.optimizer}, peak rate {run.optimizer.lr:g}, {run.optimizer.lr_decay_style} "
            f"schedule, weight decay {run.optimizer.weight_decay:g}, clipping {run.optimizer.clip_grad:g}"
        ),
        "precision": run.training.precision,
        "seed": f"{run.training.seed}",
    }


def _advice(config) -> str:
    lines = []
    if config.num_recursions > 1:
        lines.append(f"`depth=n` (1 to {config.num_recursions}), given to `generate`, fixes the depth of all tokens.")
    if config.routing_method.looks_ahead:
        lines.append("`router_threshold=t` trades depth for speed: a token goes on if the router's sigmoid reaches t.")
    return " ".join(lines)
