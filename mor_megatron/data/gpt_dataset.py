"""Megatron-core's GPTDataset with a sample order that does not depend on how long the run is.

Megatron-core shuffles all epochs of a run together, so the first samples of a run change with `--train-iters`, and an
extended run sees other data than it would have seen. Here every epoch has its own shuffle, drawn from (seed, epoch):
sample i is a function of the corpus, the seed and i alone. Megatron-core's code reads the samples.

The index of an epoch is built when its first sample is read. Start-up therefore takes as long at sample 10^9 as at
sample 0, and memory and disk hold no epoch that has not been reached.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

_PARTS = ("documents", "samples", "shuffle")


@dataclass
class EpochDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig with the directory of the sample indexes; None is `index-cache` beside the corpus."""

    # Not Megatron-core's path_to_cache: with that, a blend cannot be built without a process group.
    index_cache: str | None = None


class EpochDataset(GPTDataset):
    """Samples of sequence_length + 1 consecutive tokens from shuffled, concatenated documents, epoch after epoch."""

    def __len__(self) -> int:
        return self._epochs() * self._samples_per_epoch()

    def passes(self) -> float:
        """Number of epochs that the requested samples cover."""
        return (self.num_samples or 1) / self._samples_per_epoch()

    def _build_document_sample_shuffle_indices(self) -> tuple[None, None, None]:
        """Build no index; Megatron-core's constructor calls this."""
        self.epoch = None
        return None, None, None

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, within = divmod(int(idx), self._samples_per_epoch())
        if epoch != self.epoch:
            self.document_index, self.sample_index, self.shuffle_index = self._epoch_index(epoch)
            self.epoch = epoch
        return super()._query_document_sample_shuffle_indices(within)

    def _epoch_index(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The index of one epoch, read from the cache or built and stored there.

        Returns:
            The documents in the order in which they are concatenated, [documents]; the start of every sample as
            (position in that order, token offset), followed by the end of the epoch, [samples + 1, 2]; for sample i of
            the epoch, the row of that table where it starts, [samples].
        """
        root = Path(self.config.index_cache or Path(self.dataset_path).parent / "index-cache")
        name = self._cache_name(epoch)
        folder = root / name
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            # All ranks of a node reach an epoch together, and one index in memory is enough.
            with (root / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _save(folder, dict(zip(_PARTS, self._build_epoch(epoch), strict=True)))
            Path(lock.name).unlink(missing_ok=True)
        return tuple(np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS)

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = self._get_num_tokens_per_epoch()
        # A split with fewer tokens than one sample is repeated until it fills one, which is then an epoch.
        repeats = math.ceil((self.config.sequence_length + 1) / tokens)
        lengths = np.array(self.dataset.sequence_lengths)
        random = np.random.RandomState([self.config.random_seed, epoch])
        order = np.concatenate([random.permutation(self.indices) for _ in range(repeats)]).astype(np.int32)
        rows = helpers.build_sample_idx(lengths, order, self.config.sequence_length, repeats, tokens, True, True)
        return order, rows, random.permutation(len(rows) - 1)

    def _epochs(self) -> int:
        return math.ceil(max(1, self.num_samples or 1) / self._samples_per_epoch())

    def _samples_per_epoch(self) -> int:
        return max(1, (self._get_num_tokens_per_epoch() - 1) // self.config.sequence_length)

    def _cache_name(self, epoch: int) -> str:
        """A name that changes with everything that the index depends on, including the state of the corpus's files."""
        files = [os.stat(f"{self.dataset_path}{suffix}") for suffix in (".bin", ".idx")]
        dependencies = (
            os.path.abspath(self.dataset_path),
            [(file.st_size, file.st_mtime_ns) for file in files],
            (int(self.indices[0]), int(self.indices[-1])),
            (self.config.sequence_length, self.config.random_seed, epoch),
        )
        return f"{self.index_split.name}-{hashlib.sha256(repr(dependencies).encode()).hexdigest()[:16]}"


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write all arrays, then rename their directory: a reader sees all arrays or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
        inside = Path(partial) / "index"
        inside.mkdir()
        for name, array in arrays.items():
            np.save(inside / f"{name}.npy", array)
        try:
            inside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
