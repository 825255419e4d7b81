"""What a plan needs to know of the teacher of a run: its settings, from its config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mor_megatron.config.layout import check_layout
from mor_megatron.config.schema import Config
from mor_megatron.planning.teacher import beside


def teacher_settings(config: Config) -> Config | None:
    """Settings of a run with the model of `distill_from`; None without one.

    Args:
        config: of the run that it teaches, its vocabulary resolved.
    Raises:
        ValueError: the directory is no model that can be read, or one of another vocabulary, or does not fit the run.
    """
    if config.distillation.distill_from is None:
        return None
    from mor_megatron.huggingface.importing import read_config  # imports transformers, which other runs do without

    path = config.distillation.distill_from
    with refusing(path):
        teacher = read_config(Path(path), config.data.seq_length)
        _check(teacher, config)
    return teacher


@contextmanager
def refusing(path: str) -> Iterator[None]:
    """Says of what is raised inside that it is the teacher's."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"distill-from={path} cannot teach this run: {error}") from error


def _check(teacher: Config, config: Config) -> None:
    if teacher.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"its vocabulary has {teacher.model.vocab_size} entries, and vocab-size={config.model.vocab_size}: use a "
            "teacher of the same tokenizer"
        )
    longest, length = teacher.model.max_position_embeddings, config.data.seq_length
    if length > longest:
        raise ValueError(f"it reads up to {longest} tokens, and seq-length={length}: use a shorter --seq-length")
    check_layout(beside(config, teacher), config.parallel.tensor_model_parallel_size)
