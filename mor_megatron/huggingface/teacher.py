"""The teacher of a run (`--distill-from`): a directory of transformers as a model of the training stack.

Each rank that has the head holds its share under the run's tensor parallelism, in the run's precision, without
gradients and optimizer. Neither pipeline nor ZeRO divides a teacher further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from mor_megatron.checkpointing.shards import Sharding
from mor_megatron.config.layout import check_layout
from mor_megatron.config.schema import Config, RecursionConfig
from mor_megatron.data.tokenizers import Tokenizer, build_tokenizer
from mor_megatron.distributed.collectives import first_problem
from mor_megatron.distributed.cpu import device
from mor_megatron.huggingface.importing import kind_of, read_export, read_llama
from mor_megatron.huggingface.verify import EXTRACT
from mor_megatron.model.distillation import Distillation, Mixture
from mor_megatron.model.mor_model import EMBEDDING, HEAD, MoRModel
from mor_megatron.model.stored_names import stored_name, stored_parameters


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
    path = Path(wanted.distill_from)
    try:
        if model.is_last_stage:
            teacher = _teacher(path, config, tokenizer)
    except (ValueError, OSError) as error:
        problem = f"distill-from={path} cannot teach this run: {error}"
    problem = first_problem(problem)
    if problem is not None:
        raise ValueError(problem)
    return (
        None if teacher is None else Distillation(teacher, Mixture(wanted.distill_temperature, wanted.distill_weight))
    )


def _teacher(path: Path, config: Config, tokenizer: Tokenizer | None) -> MoRModel:
    if kind_of(path) == "mor":
        weights, own = read_export(path)
    else:
        weights, own, *_ = read_llama(path, RecursionConfig(), None, "stepwise", 0)
    _check_vocabulary(path, own, config, tokenizer)
    longest, length = own.model.max_position_embeddings, config.data.seq_length
    if length > longest:
        raise ValueError(f"it reads up to {longest} tokens, and seq-length={length}: use a shorter --seq-length")
    parallel = replace(config.parallel, pipeline_model_parallel_size=1, pipeline_layers=None)
    own = replace(
        own,
        model=replace(own.model, make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by),
        data=config.data,
        training=replace(config.training, zero_stage=0, recompute_granularity=None),
        parallel=parallel,
    )
    check_layout(own, parallel.tensor_model_parallel_size)
    teacher = MoRModel(own)
    _fill(teacher, weights)
    return teacher.to(device()).eval().requires_grad_(False)


def _check_vocabulary(path: Path, own: Config, config: Config, tokenizer: Tokenizer | None) -> None:
    """Refuse a model whose ids stand for other text."""
    if own.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"its vocabulary has {own.model.vocab_size} entries, and vocab-size={config.model.vocab_size}: use a "
            "teacher of the same tokenizer"
        )
    has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if tokenizer is None or not has_tokenizer or config.data.tokenizer_type == "NullTokenizer":
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
