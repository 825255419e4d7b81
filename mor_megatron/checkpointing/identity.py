"""Which model a checkpoint is of, and what of it a run that loads it may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from mor_megatron.checkpointing.pieces import Cut
from mor_megatron.config.schema import Config
from mor_megatron.parallel.stages import pipeline_plan

NEW_IN_FINETUNING = (
    "num-layers",
    "num-recursions",
    "sharing-strategy",
    "kv-mode",
    "routing",
    "router-type",
    "router-objective",
)
"""Settings that `--finetune` may change: how often and in which order the stored layers run, and who routes. Every
weight that is loaded keeps its name and shape; router weights that the checkpoint lacks begin as in a new run."""


def model_shape(config: Config, vocab_size: int) -> dict[str, Any]:
    """The settings that decide which function of its parameters the model is, and what shape they have."""
    model, recursion = config.model, config.recursion
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    shape = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "num-query-groups": groups,
        "kv-channels": model.kv_channels,
        "untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "vocab-size": vocab_size,
        "num-recursions": recursion.num_recursions,
        "routing": recursion.routing,
    }
    if model.add_qkv_bias:
        shape["add-qkv-bias"] = True
    if recursion.num_recursions > 1:
        shape |= {"sharing-strategy": recursion.sharing_strategy, "kv-mode": recursion.kv_mode}
    if recursion.routing != "none":
        shape |= {"router-type": recursion.router_type, "router-objective": recursion.router_objective}
    return shape


def layout(config: Config, vocab_size: int) -> dict[str, Any]:
    """How state is divided among ranks and in which form."""
    parallel = config.parallel
    return {
        "tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "sequence-parallel": parallel.sequence_parallel,
        "pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "pipeline-layers": list(pipeline_plan(config, vocab_size).block_layers),
        "data-parallel ranks": parallel_state.get_data_parallel_world_size(),
        "zero-stage": config.training.zero_stage,
        "precision": "bf16" if config.training.bf16 else "fp16" if config.training.fp16 else "fp32",
    }


def require_same_model(directory: Path, saved: dict[str, Any], wanted: dict[str, Any], finetune: bool) -> None:
    """Refuse a checkpoint of another model.

    Args:
        saved: `model_shape` of the run that wrote it, and its optimizer.
        finetune: whether what `NEW_IN_FINETUNING` lists, and the optimizer, may differ.
    Raises:
        ValueError: names the setting and both values.
    """
    for name in {**saved, **wanted}:
        if saved.get(name) == wanted.get(name) or (finetune and name in (*NEW_IN_FINETUNING, "optimizer")):
            continue
        remedy = "give the model the same settings"
        if name == "optimizer":
            remedy = "use the same, or load weights only with --finetune"
        raise ValueError(
            f"{name}={wanted.get(name)} does not fit {directory}, written with {name}={saved.get(name)}: {remedy}, or "
            "leave out --load"
        )


def require_same_parameters(directory: Path, saved: dict[str, Cut], wanted: dict[str, Cut], finetune: bool) -> None:
    """Refuse a checkpoint that lacks a parameter, has another shape of it, or has one that the model would not load.

    Args:
        finetune: whether routers may be new, or not be wanted any more.
    Raises:
        ValueError: names the parameter.
    """
    remedy = "give the model the same layers" if finetune else "give the model the same settings"
    for name in sorted({*saved, *wanted}):
        if finetune and name.startswith("router."):
            continue
        ours, theirs = (_shown(cuts.get(name)) for cuts in (wanted, saved))
        if ours != theirs:
            raise ValueError(f"{name} is {ours} in this model and {theirs} in {directory}: {remedy}")


def _shown(cut: Cut | None) -> str:
    if cut is None:
        return "not there"
    how = "not cut" if cut.dim is None else f"cut along dimension {cut.dim} in {cut.stride}"
    return f"of shape {list(cut.unpadded)}, {how}"
