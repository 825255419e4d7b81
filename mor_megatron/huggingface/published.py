"""Directories of transformers as they are published: what their config.json says, and which files hold the weights."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mor_megatron.config.schema import ModelConfig
from mor_megatron.huggingface.convert_config import rope_scaling

FAMILY = ("llama", "mistral", "qwen2")
"""Model types whose layers are these, as far as `model_config` lets them through."""
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
"""Settings of theirs that have no default here."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3 says of its rotary scaling, beside the factor."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where transformers looks for weights, in this order; a file may be sharded under an index of its name."""


def read_settings(path: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}/config.json cannot be read ({error}): give a directory of transformers") from error


def model_config(
    path: Path, max_positions: int | None = None, seq_length: int | None = None
) -> tuple[ModelConfig, int]:
    """Shape of a model of the LLaMA family, and its number of layers.

    Args:
        max_positions: longest sequence of the new model; None: the old one's.
        seq_length: of the run that it is read for; None: it may be any up to the longest.
    Raises:
        ValueError: a setting is missing, or the model has something that ours has not.
    """
    settings = read_settings(path)
    for name in _NEEDED:
        if name not in settings:
            raise ValueError(f"{path}/config.json lacks {name}: give a directory of transformers")
    is_qwen = settings.get("model_type") == "qwen2"
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    _refuse(path, settings)
    longest = max_positions or settings["max_position_embeddings"]
    _check_window(path, settings, longest, seq_length)
    heads = settings["num_attention_heads"]
    groups = settings.get("num_key_value_heads") or heads
    model = ModelConfig(
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else None,
        kv_channels=settings.get("head_dim") or settings["hidden_size"] // heads,
        max_position_embeddings=longest,
        norm_epsilon=settings["rms_norm_eps"],
        rotary_base=rope.get("rope_theta") or settings.get("rope_theta", 10000.0),
        **rope_scaling(_scaling_factor(path, rope)),
        add_qkv_bias=is_qwen,
        init_method_std=settings.get("initializer_range", 0.02),
        untie_embeddings_and_output_weights=not settings.get("tie_word_embeddings", False),
        vocab_size=settings["vocab_size"],
    )
    return model, settings["num_hidden_layers"]


def read_tensors(path: Path, tied: bool) -> dict[str, Tensor]:
    """All weights of a directory, fp32; without the head if it is the embedding.

    Args:
        path: may hold other weight files beside those that transformers reads; they are left alone.
    Raises:
        ValueError: there are none, a shard of an index is missing, or a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            if file.suffix == ".bin":
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
            else:
                tensors |= load_file(file)
        except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}): copy it again") from error
    if tied:
        tensors.pop("lm_head.weight", None)
    return {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def weight_files(path: Path) -> list[Path]:
    """The files that transformers would read, and no other.

    Raises:
        ValueError: there are none, or a shard of an index is missing.
    """
    for name in _WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [path / name]
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{index} cannot be read ({error}): copy it again") from error
            missing = [shard for shard in shards if not (path / shard).exists()]
            if missing:
                raise ValueError(
                    f"{path} lacks {missing[0]}, one of {len(missing)} missing of {len(shards)} shards that "
                    f"{index.name} names: download it again"
                )
            return [path / shard for shard in shards]
    names = " or ".join(_WEIGHTS)
    raise ValueError(f"{path} has no weights: transformers keeps them in {names}, whole or under an .index.json")


def _refuse(path: Path, settings: dict[str, Any]) -> None:
    refused = {
        "attention_bias": settings.get("attention_bias", False),
        "mlp_bias": settings.get("mlp_bias", False),
        "hidden_act": None if settings.get("hidden_act", "silu") == "silu" else settings["hidden_act"],
        "quantization_config": settings.get("quantization_config"),
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"{path}: {name}={value} is more than these layers can do: it cannot be imported")


def _check_window(path: Path, settings: dict[str, Any], longest: int, seq_length: int | None) -> None:
    """A window over which no sequence reaches out is no window."""
    window = settings.get("sliding_window")
    is_used = settings.get("use_sliding_window", settings.get("model_type") != "qwen2")
    name, length = ("max-position-embeddings", longest) if seq_length is None else ("seq-length", seq_length)
    if window and is_used and length > window:
        raise ValueError(
            f"{path}: sliding_window={window} hides tokens in sequences of up to {name}={length}, and these layers see "
            f"all: give --{name} {window}"
        )


def _scaling_factor(path: Path, rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return None
    if kind == "llama3" and all(rope.get(name) == value for name, value in LLAMA3.items()):
        return rope["factor"]
    raise ValueError(
        f"{path}: rope_parameters={rope} is more than these layers can do, which know none and Llama 3's "
        f"({', '.join(f'{name} {value:g}' for name, value in LLAMA3.items())}): it cannot be imported"
    )
