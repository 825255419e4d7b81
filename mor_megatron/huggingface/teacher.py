"""The teacher of a run (`--distill-from`): a directory of transformers as a model of the training stack.

`planning.teacher` says where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.checkpointing.shards import Sharding
from mor_megatron.config.schema import Config, RecursionConfig
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer
from mor_megatron.distributed.collectives import first_problem
from mor_megatron.distributed.cpu import device
from mor_megatron.huggingface.importing import kind_of, read_export, read_llama
from mor_megatron.huggingface.teacher_settings import refusing, teacher_settings
from mor_megatron.huggingface.verify import EXTRACT
from mor_megatron.model.distillation import Distillation, Mixture
from mor_megatron.model.mor_model import MoRModel
from mor_megatron.model.stored_names import EMBEDDING, HEAD, stored_name, stored_parameters
from mor_megatron.planning.teacher import beside


def load_teacher(model: MoRModel, config: Config, tokenizer: Tokenizer | None = None) -> Distillation | None:
    """Distillation as the settings want it, on the ranks that have the head; collective over all ranks.

    Args:
        model: this rank's part of the model that learns.
        config: of the run.
        tokenizer: of the run.
    Returns:
        None on other ranks, and without `distill_from`.
    Raises:
        ValueError: the directory is no model that can be read, or one of another vocabulary, or does not fit the run.
    """
    wanted, teacher, problem = config.distillation, None, None
    if wanted.distill_from is None:
        return None
    try:
        settings = beside(config, teacher_settings(config))
        if model.is_last_stage:
            with refusing(wanted.distill_from):
                teacher = _teacher(Path(wanted.distill_from), settings, tokenizer)
    except ValueError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise ValueError(problem)
    return (
        None if teacher is None else Distillation(teacher, Mixture(wanted.distill_temperature, wanted.distill_weight))
    )


def _teacher(path: Path, settings: Config, tokenizer: Tokenizer | None) -> MoRModel:
    """The model of a directory, with settings of `beside`."""
    _check_tokenizer(path, settings, tokenizer)
    if kind_of(path) == "mor":
        weights, _ = read_export(path)
    else:
        weights, *_ = read_llama(path, RecursionConfig(), None, "stepwise", 0, settings.data.seq_length)
    teacher = MoRModel(settings)
    _fill(teacher, weights)
    return teacher.to(device()).eval().requires_grad_(False)


def _check_tokenizer(path: Path, settings: Config, tokenizer: Tokenizer | None) -> None:
    """Refuse a model whose ids stand for other text."""
    has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if tokenizer is None or not has_tokenizer or settings.data.tokenizer_type == "NullTokenizer":
        return
    text = EXTRACT[:20_000]
    if build_tokenizer("HuggingFaceTokenizer", str(path)).tokenize(text) != tokenizer.tokenize(text):
        raise ValueError(f"its tokenizer gives text other ids than {tokenizer.origin}: use a teacher of the same one")


@torch.no_grad()
def _fill(model: MoRModel, weights: Mapping[str, Tensor]) -> None:
    """Give this rank's model its shares of whole weights, by our names."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in stored_parameters(model):
        shape, sharding = list(parameter.shape), Sharding(tuple(parameter.shape))
        if getattr(parameter, "tensor_model_parallel", False):
            dim = parameter.partition_dim
            shape[dim] *= size
            rows = model.vocab_size if name in (EMBEDDING, HEAD) else None
            sharding = Sharding(tuple(shape), dim, parameter.partition_stride, size, rows)
        parameter.copy_(sharding.shard(weights[name], rank).view_as(parameter))
    names = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if stored_name(name, names) in weights:
            buffer.copy_(weights[stored_name(name, names)])
