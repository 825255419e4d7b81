"""Tasks of EleutherAI's lm-evaluation-harness, on a loaded model and tokenizer.

The numbers equal those of `lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True` on an export; this
module also evaluates checkpoints, on any number of data-parallel ranks. Tokens are selected by threshold, which is
causal. The harness does not mask padding, but pads on the right, so padding cannot influence a score.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from mor_megatron.evaluation.generative import generate_greedily
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM

PAPER = "paper"
"""Name of the preset."""
PAPER_TASKS = {
    "lambada_openai": 0,
    "hellaswag": 0,
    "piqa": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "mmlu": 5,
    "mmlu_continuation": 0,
}
"""Task -> examples in its prompt, as the MoR paper's authors evaluate (docs/evaluation.md)."""
_MISSING = "tasks need lm-evaluation-harness, which is not installed: pip install -r requirements-eval.txt"


@dataclass(frozen=True)
class Options:
    """Options for all tasks of one call."""

    batch_size: int = 8
    num_fewshot: int | None = None
    """Examples in the prompt; None: those of the preset, otherwise the task's own number."""
    limit: int | None = None
    """Documents per task; None: all."""
    include_path: Path | None = None
    """Directory of additional tasks."""


def chosen_tasks(names: Sequence[str]) -> dict[str, int | None]:
    """Task -> examples in its prompt (None: the task's own number), with the preset expanded."""
    chosen: dict[str, int | None] = {}
    for name in names:
        chosen |= PAPER_TASKS if name == PAPER else {name: None}
    return chosen


def run_tasks(
    model: MoRForCausalLM, tokenizer: PreTrainedTokenizerBase | None, names: Sequence[str], options: Options
) -> dict | None:
    """Evaluate tasks. Collective over all ranks of the process group, if there is one.

    Args:
        model: in evaluation mode; the same on every rank.
        tokenizer: of the model.
        names: tasks, groups or tags of lm-eval, or `paper`.
    Returns:
        The harness's results, versions and numbers of examples by task and group; None on all ranks except the first.
    Raises:
        ValueError: lm-eval is not installed, a task is unknown, or the model has no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("tasks consist of text, and this model has no tokenizer")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(_MISSING) from error

    class RankedLM(HFLM):
        """Tell the harness its rank; it would otherwise ask accelerate, which loads the model itself. And generate on
        the engine."""

        def __init__(self):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
            if dist.is_initialized():
                self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            texts = generate_greedily(self, requests, options.batch_size, not disable_tqdm and self.rank == 0)
            return super().generate_until(requests, disable_tqdm) if texts is None else texts

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
            dist.all_gather(parts, tensor)
            return torch.stack(parts)

        def barrier(self) -> None:
            dist.barrier()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already loaded, which is intended
    chosen = chosen_tasks(names)
    manager = TaskManager(include_path=options.include_path, include_defaults=False)
    if set(chosen) - set(manager.all_tasks):  # reading the harness's own many tasks takes seconds
        manager = TaskManager(include_path=options.include_path)
    unknown = [name for name in chosen if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks={unknown[0]} is unknown to lm-eval: `lm_eval ls tasks` lists them")
    specs = list(chosen)
    if options.num_fewshot is None:
        specs = [name if shots is None else {"task": name, "num_fewshot": shots} for name, shots in chosen.items()]
    results = lm_eval.simple_evaluate(
        RankedLM(),
        tasks=specs,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    if results is None:
        return None
    kept = ("results", "groups", "group_subtasks", "n-shot", "versions", "higher_is_better", "n-samples")
    return {key: results[key] for key in kept if key in results}


def table(results: dict) -> str:
    """The harness's own tables."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)
