"""From a directory of transformers to a checkpoint that a run starts from with `--load DIR --finetune`.

Three kinds are known: our own exports, models of the LLaMA family, and the checkpoints of the paper's authors.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from mor_megatron.checkpointing.compatibility import model_shape
from mor_megatron.checkpointing.directory import PARTIAL, checkpoint_name, publish
from mor_megatron.checkpointing.kept_tokenizer import KeptTokenizer
from mor_megatron.checkpointing.manifest import CONFIG, MANIFEST, Manifest
from mor_megatron.checkpointing.randomness import random_state
from mor_megatron.checkpointing.shards import BUFFER, WEIGHT, ShardEntry, Sharding
from mor_megatron.checkpointing.stored_file import write_tensors, write_text
from mor_megatron.config.cli import to_yaml
from mor_megatron.config.schema import Config, RecursionConfig
from mor_megatron.data.tokenizers import build_tokenizer
from mor_megatron.huggingface.authors import SECTIONS, first_uses, parameter_names, recursion_config
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import ends_in_padding, run_config, training_config
from mor_megatron.huggingface.low_rank import Residual, relaxed_weights
from mor_megatron.huggingface.published import FAMILY, model_config, read_settings, read_tensors
from mor_megatron.huggingface.uptraining import initial_weights, layers_of_positions, source_layers
from mor_megatron.huggingface.weights import export_names, layer_names, outer_names, to_ours
from mor_megatron.model.stored_names import EMBEDDING, HEAD
from mor_megatron.planning.accounting import routers
from mor_megatron.training.progress import Progress

logger = logging.getLogger(__name__)

Imported = tuple[dict[str, Tensor], Config]
"""Whole fp32 tensors by our names, and the validated settings of a run with this model."""


class Start(NamedTuple):
    """A model of the LLaMA family as the beginning of one of ours."""

    weights: dict[str, Tensor]
    config: Config
    sources: dict[int, tuple[int, ...]]
    """The layers that each stored layer comes from."""
    residuals: list[Residual]
    """What relaxation makes up for; empty without."""


_DIVISION = {
    "word_embeddings": (0, 1),
    "output_layer": (0, 1),
    "linear_qkv": (0, 1),
    "linear_fc1": (0, 2),
    "linear_proj": (1, 1),
    "linear_fc2": (1, 1),
}
_DIVISION |= dict.fromkeys(("q_b", "k_b", "v_b", "gate_b", "up_b", "o_a", "down_a"), (2, 1))  # of adapters
"""Along which dimension, and in how many parts by themselves, tensor parallelism divides a weight of this name."""


def read_config(path: Path, seq_length: int | None = None) -> Config:
    """Settings of a run with the model of a directory, ours or of the LLaMA family, as it is; no weights are read.

    Args:
        seq_length: of the run; None: it may be any up to the model's longest.
    Raises:
        ValueError: config.json is missing, or of another kind of model, or of one that has something ours has not.
    """
    if kind_of(path) == "mor":
        return training_config(MoRConfig.from_pretrained(path))
    model, layers = model_config(path, seq_length=seq_length)
    return run_config(replace(model, num_layers=layers), RecursionConfig())


def read_export(path: Path) -> Imported:
    """One of our own exports; weights come back bit for bit if they were stored in fp32.

    Raises:
        ValueError: files are missing, or the weights are not of this model.
    """
    exported = MoRConfig.from_pretrained(path)
    config = training_config(exported)
    if exported.padding_row is not None and not ends_in_padding(exported):
        logger.warning(
            f"{path} has tokens behind that of padding, {exported.padding_row}: to training it is an id like others"
        )
    weights = to_ours(read_tensors(path, exported.tie_word_embeddings), export_names(config), config.model)
    for name in {EMBEDDING, HEAD} & weights.keys():
        weights[name] = weights[name][: config.model.vocab_size].clone()
    return weights, config


def read_llama(
    path: Path,
    recursion: RecursionConfig,
    num_layers: int | None,
    initialization: str,
    seed: int,
    max_positions: int | None = None,
    adapters: str = "svd",
) -> Start:
    """A model of the LLaMA family, as it is or as the beginning of a recursive one.

    Args:
        recursion: how the new model shares its layers, and how its recursions differ; a run that fine-tunes it may add
            routing.
        num_layers: its unrolled depth; None: the old one's.
        initialization, seed: see `uptraining.source_layers`.
        max_positions: longest sequence of the new model; None: the old one's.
        adapters: see `low_rank.relaxed_weights`.
    Raises:
        ValueError: the model has something that ours has not, or the depths do not fit.
    """
    model, old_layers = model_config(path, max_positions)
    config = run_config(replace(model, num_layers=num_layers or old_layers), recursion)
    tied = not model.untie_embeddings_and_output_weights
    tensors = read_tensors(path, tied)
    names = outer_names(tied)
    for number in range(old_layers):
        names |= layer_names(number, f"model.layers.{number}", model.add_qkv_bias)
    old = to_ours(tensors, names, config.model)

    def layer(number: int) -> dict[str, Tensor]:
        prefix = f"layers.{number}."
        return {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}

    sources = source_layers(config.plan, old_layers, initialization, seed)
    weights = {name: tensor for name, tensor in old.items() if not name.startswith("layers.")}
    weights |= initial_weights(sources, layer)
    residuals: list[Residual] = []
    if config.recursion.is_relaxed:
        positions = layers_of_positions(config.plan, old_layers)
        own, residuals = relaxed_weights(config, positions, layer, weights, adapters, seed)
        weights |= own
    return Start(weights, config, sources, residuals)


def read_authors(path: Path, settings_file: Path) -> Imported:
    """A checkpoint of the paper's authors.

    Args:
        path: directory with config.json and weights.
        settings_file: YAML configuration of their run, with its sections recursive, kv_sharing and mor.
    Raises:
        ValueError: a setting is unknown, or uses of a shared layer have weights of their own.
    """
    settings = yaml.safe_load(settings_file.read_text())
    model, depth = model_config(path)
    recursion = recursion_config({name: settings.get(name) for name in SECTIONS}, depth, settings_file)
    tensors = read_tensors(path, tied=False)
    tied = "lm_head.weight" not in tensors or torch.equal(
        tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    )
    if tied:
        tensors.pop("lm_head.weight", None)
    model = replace(model, num_layers=depth, untie_embeddings_and_output_weights=not tied)
    config = run_config(model, recursion)
    plan = config.plan
    stored = first_uses(tensors, plan, recursion.routing)
    names = parameter_names(plan, recursion, tied, stored.keys())
    return to_ours(stored, names, config.model), config


def read_tokenizer(path: Path) -> KeptTokenizer | None:
    """The tokenizer in a directory of transformers; None, and a notice, if there is none that can be read."""
    try:
        return KeptTokenizer.of("HuggingFaceTokenizer", build_tokenizer("HuggingFaceTokenizer", str(path)))
    except ValueError as error:
        print(f"no tokenizer is imported: {error}")
        return None


def write_checkpoint(
    weights: Mapping[str, Tensor], config: Config, root: Path, tokenizer: KeptTokenizer | None = None
) -> Path:
    """Publish the weights as iteration 0 of a run's directory; there is no optimizer state.

    Args:
        tokenizer: to be kept with them.
    Raises:
        ValueError: the directory has something in it, or cannot be written.
    """
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"output={root} is not empty: name a new directory")
    partial = root / f"{checkpoint_name(0)}{PARTIAL}"
    # Batch, length and rates are open: the validated ones are those of a hundred iterations on one rank.
    settings = Config(model=config.model, recursion=config.recursion, data=config.data)
    buffers = {f"router.{name}" for name, _ in routers(config).named_buffers()}
    kinds = {name: BUFFER if name in buffers else WEIGHT for name in weights}
    entries = [(str(ShardEntry(kinds[name], name, 0, 0)), tensor.float().flatten()) for name, tensor in weights.items()]
    manifest = Manifest(
        progress=asdict(Progress()),
        model=model_shape(config),
        layout={},
        optimizer=config.optimizer.optimizer,
        versions={},
        loss_scaler=None,
        random=random_state(),
        parameters={name: _sharding(name, tensor) for name, tensor in weights.items()},
        files={},
        tokenizer=None if tokenizer is None else tokenizer.entry(),
    )
    try:
        partial.mkdir(parents=True)
        state = "state_00000.safetensors"
        manifest.files[state] = write_tensors(partial / state, entries)
        manifest.files[CONFIG] = write_text(partial / CONFIG, to_yaml(settings))
        if tokenizer is not None:
            manifest.files.update(tokenizer.write(partial))
        write_text(partial / MANIFEST, manifest.to_json())
        return publish(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"output={root} cannot be written ({error.strerror or error}): choose another") from error


def _sharding(name: str, tensor: Tensor) -> Sharding:
    """What a run on one rank would have written of it."""
    *_, module, leaf = name.split(".")
    part = leaf if module == "adapters" else module
    if part not in _DIVISION:
        return Sharding(tuple(tensor.shape))
    dim, stride = _DIVISION[part]
    rows = tensor.shape[0] if part in ("word_embeddings", "output_layer") else None
    return Sharding(tuple(tensor.shape), dim, stride, rows=rows)


def kind_of(path: Path) -> str:
    """`mor` for an export of ours, `llama` for a model of that family.

    Raises:
        ValueError: no config.json, or another kind of model.
    """
    model_type = read_settings(path).get("model_type")
    if model_type == MoRConfig.model_type:
        return "mor"
    if model_type in FAMILY:
        return "llama"
    raise ValueError(f"{path} is of model_type={model_type}: only {', '.join(('mor', *FAMILY))} can be imported")
