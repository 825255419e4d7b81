"""Settings of an engine, and which models it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.recursion.setting import check, setting


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine.

    Raises:
        ValueError: a value is out of range.
    """

    lanes: int = setting(32, least=1)
    """Sequences that run at a time."""
    turn_at: int | None = setting(None, least=1)
    """Sequences that must have left the block before the layers around it run; default: automatic, from the time that
    passes and turns take."""
    max_length: int | None = setting(None, least=2)
    """Most tokens of a sequence, prompt and continuation; default the model's max_position_embeddings."""
    chunk: int = setting(256, least=1)
    """Most rows of prompts inside the model at a time. Longer prompts enter in parts."""
    page_size: int = setting(16, least=1)
    """Rows of a page of keys and values."""
    kv_bytes: int | None = setting(None, least=1)
    """Memory for keys and values; default enough for all lanes at max_length."""
    prefix_cache: bool = True
    """Keep keys and values of prompts for others that begin alike, as long as there is room."""
    attention: Literal["auto", "native", "torch"] = "auto"
    """Kernels that are compiled on first use, or PyTorch alone. On a CPU they are for attention of single rows and for
    products with weights that are packed once; on a GPU for attention."""
    enforce_eager: bool = False
    """On a GPU, launch kernels one by one instead of replaying CUDA graphs."""

    def __post_init__(self):
        check(self, dashes=False)


def check_model(model: MoRForCausalLM) -> None:
    """Refuse what an engine cannot serve.

    Raises:
        ValueError: why not, and what to do instead.
    """
    config, plan = model.config, model.model.plan
    if model.training:
        raise ValueError("the model is in training mode: call eval()")
    if config.kv_mode == "sharing_update" and plan.num_recursions > 1:
        raise ValueError(
            "kv_mode=sharing_update replaces keys of recursion 0 by those of later ones for single tokens, which pages "
            "cannot express: use generate(), or train with caching or sharing"
        )
    if not plan.is_cyclic:
        raise ValueError(
            f"sharing_strategy={plan.strategy} does not repeat one block, so there is nothing to batch by depth: "
            "export the model with --as llama, or use generate()"
        )
