"""Save and resume a run, bit for bit in the same layout.

```
DIR/latest                     name of the newest complete checkpoint, written last
DIR/iter_0000010/config.yaml   resolved settings
DIR/iter_0000010/metadata.json progress, what shapes the parameters, layout, versions
DIR/iter_0000010/rng_00000.pt  random state of each rank
DIR/iter_0000010/*.pt          DeepSpeed's files: model_states (weights and buffers), optim_states of each rank
```
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from mor_megatron.config.cli import save_config
from mor_megatron.config.schema import Config
from mor_megatron.parallel.stages import pipeline_plan
from mor_megatron.training.engine import Engine, quiet

FORMAT = 1
LATEST = "latest"


@dataclass
class Progress:
    """How far a run is; everything else of its state lies in the engine."""

    iteration: int = 0
    """Iterations completed, skipped ones included."""
    consumed_samples: int = 0
    """Training sequences used by them."""
    skipped_iterations: int = 0
    """Iterations whose step was not applied."""
    nan_iterations: int = 0
    """Iterations whose loss was not finite."""
    skipped_in_a_row: int = 0
    """Unapplied steps since the last applied one."""


def save_checkpoint(engine: Engine, config: Config, progress: Progress, vocab_size: int) -> Path:
    """Write one checkpoint under `config.checkpoint.save`; collective over all ranks.

    `latest` names it only once every rank has written its part.

    Returns:
        Its directory.
    Raises:
        OSError: the directory cannot be written.
    """
    root = Path(config.checkpoint.save)
    name = f"iter_{progress.iteration:07d}"
    hook = engine.module.register_state_dict_post_hook(_drop_extra_state)
    engine.save_checkpoint(str(root), tag=name, save_latest=False)
    hook.remove()
    directory = root / name
    torch.save(_random_state(), directory / _rng_name(dist.get_rank()))
    if dist.get_rank() == 0:
        save_config(config, directory / "config.yaml")
        metadata = {
            "format": FORMAT,
            "progress": asdict(progress),
            "model": model_shape(config, vocab_size),
            "layout": layout(config, vocab_size),
            "versions": {package: version(package) for package in ("torch", "megatron-core", "deepspeed")},
        }
        (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    dist.barrier()
    if dist.get_rank() == 0:
        partial = root / f"{LATEST}.partial"
        partial.write_text(name + "\n")
        os.replace(partial, root / LATEST)
    return directory


def load_checkpoint(engine: Engine, config: Config, vocab_size: int) -> Progress:
    """Restore the newest checkpoint of `config.checkpoint.load` into the engine; collective over all ranks.

    Without `--load`, or with a directory that has no checkpoint (rank 0 then prints a notice), the run starts from
    scratch.

    Raises:
        ValueError: the checkpoint is of another model, layout or format, or parts of it are missing.
    """
    if config.checkpoint.load is None:
        return Progress()
    root = Path(config.checkpoint.load)
    if not (root / LATEST).is_file():
        if dist.get_rank() == 0:
            print(f"no checkpoint in {root}: starting from scratch", flush=True)
        return Progress()
    directory = root / (root / LATEST).read_text().strip()
    metadata = _read_metadata(directory)
    _require_equal(directory, metadata["model"], model_shape(config, vocab_size), "give the model the same settings")
    _require_equal(directory, metadata["layout"], layout(config, vocab_size), "resume in the layout that wrote it")
    for rank in range(dist.get_world_size()):  # every rank checks all, so that all raise
        if not (directory / _rng_name(rank)).is_file():
            raise ValueError(f"{directory} lacks {_rng_name(rank)}: name another checkpoint in {root / LATEST}")
    with quiet():
        path, _ = engine.load_checkpoint(str(root), tag=directory.name, custom_load_fn=_load_weights)
    if path is None:
        raise ValueError(f"{directory} has no weights: name another checkpoint in {root / LATEST}")
    random_state = torch.load(directory / _rng_name(dist.get_rank()), weights_only=True)
    _set_random_state(random_state)
    if dist.get_rank() == 0:
        print(f"resuming from {directory}", flush=True)
    return Progress(**metadata["progress"])


def model_shape(config: Config, vocab_size: int) -> dict[str, object]:
    """The settings that decide which parameters there are and what shape they have."""
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
        "make-vocab-size-divisible-by": model.make_vocab_size_divisible_by,
        "num-recursions": recursion.num_recursions,
        "routing": recursion.routing,
    }
    if recursion.num_recursions > 1:
        shape["sharing-strategy"] = recursion.sharing_strategy
    if recursion.routing != "none":
        shape |= {"router-type": recursion.router_type, "router-objective": recursion.router_objective}
    return shape


def layout(config: Config, vocab_size: int) -> dict[str, object]:
    """The settings that decide how state is divided among ranks and in which form."""
    parallel = config.parallel
    return {
        "tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "sequence-parallel": parallel.sequence_parallel,
        "pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "pipeline-layers": list(pipeline_plan(config, vocab_size).block_layers),
        "data-parallel ranks": parallel_state.get_data_parallel_world_size(),
        "zero-stage": config.training.zero_stage,
        "bf16": config.training.bf16,
        "optimizer": config.optimizer.optimizer,
    }


def _read_metadata(directory: Path) -> dict:
    path = directory / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): name another checkpoint in {directory.parent}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format={metadata.get('format')}, this version reads {FORMAT}")
    return metadata


def _require_equal(directory: Path, saved: dict, wanted: dict, remedy: str) -> None:
    for name in {**saved, **wanted}:
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{name}={wanted.get(name)} does not fit {directory}, written with {name}={saved.get(name)}: {remedy}, "
                "or leave out --load"
            )


def _drop_extra_state(module: nn.Module, state: dict, prefix: str, local_metadata) -> None:
    # Transformer Engine's slot for fp8 scales, None in every layer that Megatron-core builds without it.
    for name in [name for name, value in state.items() if name.endswith("_extra_state") and value is None]:
        del state[name]


def _load_weights(src: dict, dst: nn.Module) -> None:
    missing, unexpected = dst.load_state_dict(src, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing, missing
    assert not unexpected, unexpected


def _rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def _random_state() -> dict:
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
