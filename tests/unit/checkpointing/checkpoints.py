"""A small checkpoint as two tensor-parallel and two data-parallel ranks would write it, made by one process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mor_megatron.checkpointing.directory import PARTIAL, checkpoint_name, publish
from mor_megatron.checkpointing.manifest import CONFIG, MANIFEST, Manifest
from mor_megatron.checkpointing.randomness import random_state
from mor_megatron.checkpointing.shards import BUFFER, STEP, WEIGHT, ShardEntry, Sharding
from mor_megatron.checkpointing.stored_file import write_tensors, write_text
from mor_megatron.training.progress import Progress

SHARDINGS = {
    "embedding.word_embeddings.weight": Sharding((12, 3), dim=0, size=2, rows=11),
    "layers.0.mlp.linear_fc1.weight": Sharding((8, 3), dim=0, stride=2, size=2),
    "layers.0.mlp.linear_fc2.weight": Sharding((3, 4), dim=1, size=2),
    "final_layernorm.weight": Sharding((3,)),
    "router.balance_bias": Sharding((2,)),
}


def whole_tensors(seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """(kind, name) -> what a reader has to give back."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, sharding in SHARDINGS.items():
        for kind in (BUFFER,) if name == "router.balance_bias" else (WEIGHT, "exp_avg", "exp_avg_sq"):
            tensors[kind, name] = torch.randn(sharding.unpadded, generator=generator)
    return tensors


def write_checkpoint(root: Path, iteration: int = 10, seed: int = 0) -> Path:
    """Publish it under `root`; every shard is written in two entries, by two ranks."""
    partial = root / f"{checkpoint_name(iteration)}{PARTIAL}"
    partial.mkdir(parents=True)
    by_rank: list[list[tuple[str, Tensor]]] = [[] for _ in range(4)]
    for (kind, name), whole in whole_tensors(seed).items():
        for shard in range(SHARDINGS[name].shards):
            flat = SHARDINGS[name].shard(whole, shard)
            middle = flat.numel() // 2
            for replica, (begin, end) in enumerate([(0, middle), (middle, flat.numel())]):
                by_rank[2 * replica + shard].append(
                    (str(ShardEntry(kind, name, shard, begin)), flat[begin:end].clone())
                )
        if kind == WEIGHT:
            by_rank[0].append((str(ShardEntry(STEP, name, 0, 0)), torch.tensor([float(iteration)])))
    files = {}
    for rank, entries in enumerate(by_rank):
        file = f"state_{rank:05d}.safetensors"
        files[file] = write_tensors(partial / file, entries)
    files[CONFIG] = write_text(partial / CONFIG, "hidden-size: 3\n")
    manifest = Manifest(
        progress=asdict(Progress(iteration=iteration, consumed_samples=4 * iteration)),
        model={"hidden-size": 3, "num-recursions": 3},
        layout={"tensor-model-parallel-size": 2},
        optimizer="adam",
        versions={"torch": "2"},
        loss_scaler=None,
        random=random_state(),
        parameters=SHARDINGS,
        files=files,
    )
    write_text(partial / MANIFEST, manifest.to_json())
    return publish(partial)
