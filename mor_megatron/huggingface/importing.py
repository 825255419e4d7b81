"""From a directory of transformers to a checkpoint that a run starts from with `--load DIR --finetune`.

Three kinds are known: our own exports, models of the LLaMA family, and the checkpoints of the paper's authors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mor_megatron.checkpointing.directory import PARTIAL, checkpoint_name, publish
from mor_megatron.checkpointing.identity import model_shape
from mor_megatron.checkpointing.manifest import CONFIG, MANIFEST, Manifest, StoredFile
from mor_megatron.checkpointing.pieces import BUFFER, WEIGHT, Cut, Piece
from mor_megatron.checkpointing.randomness import random_state
from mor_megatron.checkpointing.tensor_file import write_tensors, write_text
from mor_megatron.config.cli import to_yaml
from mor_megatron.config.schema import Config, ModelConfig, RecursionConfig
from mor_megatron.huggingface.authors import SECTIONS, first_uses, parameter_names, recursion_config
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import run_config, training_config
from mor_megatron.huggingface.uptraining import initial_weights, source_layers
from mor_megatron.huggingface.weights import BALANCE_BIAS, export_names, layer_names, outer_names, to_ours
from mor_megatron.recursion.plan import plan_from_config
from mor_megatron.training.progress import Progress

Imported = tuple[dict[str, Tensor], Config]
"""Whole fp32 tensors by our names, and the validated settings of a run with this model."""

_CUTS = {
    "word_embeddings": (0, 1),
    "output_layer": (0, 1),
    "linear_qkv": (0, 1),
    "linear_fc1": (0, 2),
    "linear_proj": (1, 1),
    "linear_fc2": (1, 1),
}
"""Along which dimension, and in how many parts by themselves, tensor parallelism cuts a weight of this name."""
_LLAMA = ("llama", "mistral")
"""Model types whose layers are these, as far as `_llama_config` lets them through."""
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


def read_export(path: Path) -> Imported:
    """One of our own exports; weights come back bit for bit if they were stored in fp32.

    Raises:
        ValueError: files are missing, or the weights are not of this model.
    """
    exported = MoRConfig.from_pretrained(path)
    config = training_config(exported)
    names = export_names(exported.plan.num_physical_layers, exported.tie_word_embeddings, config.recursion)
    return to_ours(_tensors(path, exported.tie_word_embeddings), names, config.model), config


def read_llama(
    path: Path, recursion: RecursionConfig, num_layers: int | None, initialization: str, seed: int
) -> tuple[dict[str, Tensor], Config, dict[int, tuple[int, ...]]]:
    """A model of the LLaMA family, as it is or as the beginning of a recursive one.

    Args:
        recursion: how the new model shares its layers; a run that fine-tunes it may add routing.
        num_layers: its unrolled depth; None: the old one's.
        initialization, seed: see `uptraining.source_layers`.
    Returns:
        Weights, settings, and the layers that each stored layer comes from.
    Raises:
        ValueError: the model has something that ours has not, or the depths do not fit.
    """
    model, old_layers = _llama_config(path)
    config = run_config(replace(model, num_layers=num_layers or old_layers), recursion)
    tied = not model.untie_embeddings_and_output_weights
    tensors = _tensors(path, tied)
    names = outer_names(tied)
    for number in range(old_layers):
        names |= layer_names(number, f"model.layers.{number}")
    old = to_ours(tensors, names, config.model)

    def layer(number: int) -> dict[str, Tensor]:
        prefix = f"layers.{number}."
        return {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}

    sources = source_layers(plan_from_config(config), old_layers, initialization, seed)
    weights = {name: tensor for name, tensor in old.items() if not name.startswith("layers.")}
    return weights | initial_weights(sources, layer), config, sources


def read_authors(path: Path, settings_file: Path) -> Imported:
    """A checkpoint of the paper's authors.

    Args:
        path: directory with config.json and weights.
        settings_file: YAML configuration of their run, with its sections recursive, kv_sharing and mor.
    Raises:
        ValueError: a setting is unknown, or uses of a shared layer have weights of their own.
    """
    settings = yaml.safe_load(settings_file.read_text())
    model, depth = _llama_config(path)
    recursion = recursion_config({name: settings.get(name) for name in SECTIONS}, depth, settings_file)
    tensors = _tensors(path, tied=False)
    tied = "lm_head.weight" not in tensors or torch.equal(
        tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    )
    if tied:
        tensors.pop("lm_head.weight", None)
    model = replace(model, num_layers=depth, untie_embeddings_and_output_weights=not tied)
    config = run_config(model, recursion)
    plan = plan_from_config(config)
    stored = first_uses(tensors, plan, recursion.routing)
    names = parameter_names(plan, recursion, tied, stored.keys())
    return to_ours(stored, names, config.model), config


def write_checkpoint(weights: Mapping[str, Tensor], config: Config, root: Path) -> Path:
    """Publish the weights as iteration 0 of a run's directory; there is no optimizer state.

    Raises:
        ValueError: the directory has something in it, or cannot be written.
    """
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"output={root} is not empty: name a new directory")
    partial = root / f"{checkpoint_name(0)}{PARTIAL}"
    kinds = {name: BUFFER if name == BALANCE_BIAS else WEIGHT for name in weights}
    pieces = [(str(Piece(kinds[name], name, 0, 0)), tensor.float().flatten()) for name, tensor in weights.items()]
    manifest = Manifest(
        progress=asdict(Progress()),
        model=model_shape(config, config.model.vocab_size),
        layout={},
        optimizer=config.optimizer.optimizer,
        versions={},
        loss_scaler=None,
        random=random_state(),
        parameters={name: _cut(name, tensor) for name, tensor in weights.items()},
        files={},
    )
    try:
        partial.mkdir(parents=True)
        state = "state_00000.safetensors"
        manifest.files[state] = StoredFile.of(write_tensors(partial / state, pieces), tuple(key for key, _ in pieces))
        manifest.files[CONFIG] = StoredFile.of(write_text(partial / CONFIG, to_yaml(config)))
        write_text(partial / MANIFEST, manifest.to_json())
        return publish(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"output={root} cannot be written ({error.strerror or error}): choose another") from error


def _cut(name: str, tensor: Tensor) -> Cut:
    """What a run on one rank would have written of it."""
    part = name.split(".")[-2]
    if part not in _CUTS:
        return Cut(tuple(tensor.shape))
    dim, stride = _CUTS[part]
    rows = tensor.shape[0] if part in ("word_embeddings", "output_layer") else None
    return Cut(tuple(tensor.shape), dim, stride, rows=rows)


def kind_of(path: Path) -> str:
    """`mor` for an export of ours, `llama` for a model of that family.

    Raises:
        ValueError: no config.json, or another kind of model.
    """
    model_type = _json(path).get("model_type")
    if model_type == MoRConfig.model_type:
        return "mor"
    if model_type in _LLAMA:
        return "llama"
    raise ValueError(f"{path} is of model_type={model_type}: only {', '.join(('mor', *_LLAMA))} can be imported")


def _llama_config(path: Path) -> tuple[ModelConfig, int]:
    """Shape of a model of the LLaMA family, and its number of layers."""
    settings = _json(path)
    for name in _NEEDED:
        if name not in settings:
            raise ValueError(f"{path}/config.json lacks {name}: give a directory of transformers")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    refused = {
        "attention_bias": settings.get("attention_bias", False),
        "mlp_bias": settings.get("mlp_bias", False),
        "sliding_window": settings.get("sliding_window"),
        "rope_type": None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope,
        "hidden_act": None if settings.get("hidden_act", "silu") == "silu" else settings["hidden_act"],
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"{path}: {name}={value} is more than these layers can do: it cannot be imported")
    heads = settings["num_attention_heads"]
    groups = settings.get("num_key_value_heads") or heads
    model = ModelConfig(
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else None,
        kv_channels=settings.get("head_dim") or settings["hidden_size"] // heads,
        max_position_embeddings=settings["max_position_embeddings"],
        norm_epsilon=settings["rms_norm_eps"],
        rotary_base=rope.get("rope_theta") or settings.get("rope_theta", 10000.0),
        init_method_std=settings.get("initializer_range", 0.02),
        untie_embeddings_and_output_weights=not settings.get("tie_word_embeddings", False),
        vocab_size=settings["vocab_size"],
    )
    return model, settings["num_hidden_layers"]


def _json(path: Path) -> dict:
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}/config.json cannot be read ({error}): give a directory of transformers") from error


def _tensors(path: Path, tied: bool) -> dict[str, Tensor]:
    """All weights of a directory, fp32; without the head if it is the embedding."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".bin":
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
            else:
                tensors |= load_file(file)
        except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}): copy it again") from error
    if not tensors:
        raise ValueError(f"{path} has no weights: *.safetensors or pytorch_model*.bin")
    if tied:
        tensors.pop("lm_head.weight", None)
    return {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
