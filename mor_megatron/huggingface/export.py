"""From the weights of a run, in any layout, to a directory that transformers loads.

Every shared layer is stored once, vocabulary padding not at all, and the code travels with the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mor_megatron import command
from mor_megatron.checkpointing.directory import candidates
from mor_megatron.checkpointing.kept_tokenizer import with_kept_tokenizer
from mor_megatron.checkpointing.manifest import MANIFEST, Manifest, read_manifest, read_settings
from mor_megatron.checkpointing.reader import read_buffers, read_parameters
from mor_megatron.config.schema import Config
from mor_megatron.data.tokenizers import configured_tokenizer
from mor_megatron.files import as_os_error, give_usual_mode
from mor_megatron.huggingface.convert_config import export_config
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.weights import export_names, to_theirs

DTYPES = {name: getattr(torch, full) for name, full in command.DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """All that an export needs of a run."""

    path: Path
    config: Config
    """Its model resolved."""
    manifest: Manifest
    weights: dict[str, Tensor]
    """Whole, fp32, by our names; the balancing bias among them."""

    @property
    def is_trained(self) -> bool:
        """Whether a run has trained it; else it is as it was imported."""
        return self.manifest.iteration > 0


def newest_checkpoint(path: str | Path) -> Path:
    """One checkpoint's directory: the path itself, or the newest checkpoint of a run's directory.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    found = candidates(path)
    if not found:
        raise ValueError(f"{path} has no checkpoint: give a run's --save directory, or one checkpoint in it")
    return found[0]


def read_run_config(checkpoint: Path) -> tuple[Config, Manifest]:
    """Settings of the run that wrote a checkpoint, and what the checkpoint says of itself.

    The tokenizer that the settings name is the one in the checkpoint, if there is one.

    Raises:
        ValueError: it is damaged.
    """
    manifest = read_manifest(checkpoint)
    return with_kept_tokenizer(read_settings(checkpoint, manifest), checkpoint, manifest), manifest


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint of any layout, or the newest one of a run's directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = newest_checkpoint(path)
    config, manifest = read_run_config(path)
    weights = read_parameters(path) | read_buffers(path)
    return Checkpoint(path, config, manifest, weights)


def to_model(
    weights: Mapping[str, Tensor], config: Config, tokenizer: PreTrainedTokenizerBase | None = None
) -> MoRForCausalLM:
    """The exported model in memory, fp32, in evaluation mode.

    Args:
        weights: whole tensors by our names, vocabulary without padding.
        config: settings of the run, those of its model resolved.
        tokenizer: gives the special tokens; a padding token behind the vocabulary gets a row of zeros.
    Raises:
        ValueError: the weights are not of this model.
    """
    tokens = special_tokens(tokenizer, config)
    state = to_theirs(weights, export_names(config), config.model)
    if tokens.get("pad_token_id") == config.model.vocab_size:
        tokens["padding_row"] = config.model.vocab_size
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & state.keys():
            state[name] = F.pad(state[name], (0, 0, 0, 1))
    exported = export_config(config, **tokens)
    if exported.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = MoRForCausalLM(exported)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**{name: tokens[name] for name in tokens if name != "padding_row"})
    return model.eval()


def special_tokens(tokenizer: PreTrainedTokenizerBase | None, config: Config) -> dict[str, int | None]:
    """What an export's configuration says of tokens.

    Args:
        tokenizer: of the export. Without one, numbers that end documents in training do so here.
        config: of the run.
    """
    if tokenizer is not None:
        return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    if config.data.tokenizer_type == "NullTokenizer":
        end = configured_tokenizer(config.data).eod
        return {"bos_token_id": end, "eos_token_id": end}
    return {}


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, its weights in another precision; routers and buffers stay as they are."""
    for name, weight in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            weight.data = weight.data.to(dtype)
    return model


def export(
    weights: Mapping[str, Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    dtype: str = "fp32",
) -> Path:
    """`write` for a model that is made of weights as in `to_model`.

    Raises:
        ValueError: as either.
    """
    return write(to_model(weights, config, tokenizer), tokenizer, output, dtype)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, output: str | Path, dtype: str = "fp32"
) -> Path:
    """Write configuration, code, weights, generation settings and tokenizer.

    Args:
        model: in fp32; its weights are cast in place.
        tokenizer: of the export.
        output: a new directory; it appears when it is complete.
        dtype: of the stored weights: fp32, bf16, fp16.
    Raises:
        ValueError: the output exists or cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"output={output} exists: name a new directory, or move it away")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is unknown: use one of {', '.join(DTYPES)}")
    model = cast(model, DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with as_os_error(output):
            model.save_pretrained(partial)
            for weights_file in partial.glob("*.safetensors"):
                give_usual_mode(weights_file)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        partial.rename(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"output={output} cannot be written ({error.strerror or error}): choose another") from error
    return output
