"""The small model, corpus and comparisons that the tests of whole runs share."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from mor_megatron.checkpointing.reader import open_checkpoint, read_buffers, read_parameters
from mor_megatron.checkpointing.shards import STEP
from mor_megatron.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RecursionConfig,
    TrainingConfig,
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VOCABULARY = 64
MODES = [(bf16, zero) for bf16 in (False, True) for zero in (0, 1)]
"""(bf16, ZeRO stage): each goes through another DeepSpeed optimizer."""
RESUMED = [(False, 1), (True, 0)]
"""Those that two ranks resume in; distributed/test_checkpoint_layouts.py has the others."""
SMALL_MODEL = """--num-layers 8 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --num-recursions 3
    --routing expert_choice --vocab-size 64 --seq-length 24 --split 80,20,0 --micro-batch-size 4 --global-batch-size 8
    --peak-tflops 1"""
"""The model and batch of `small_config` as flags."""
TIMES = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "utilisation", "hardware_utilisation")


def load_tool(name: str) -> ModuleType:
    """A program of tools/ as a module, by its path: benchmarks and packages have programs' names, too."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mode_name(mode: tuple[bool, int]) -> str:
    return f"{'bf16' if mode[0] else 'fp32'}-zero{mode[1]}"


def write_corpus(prefix: Path) -> str:
    """Documents of arithmetic progressions modulo the vocabulary: learnable within a few iterations."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(80):
        length, start, step = generator.integers((20, 0, 1), (90, VOCABULARY, 4))
        document = (start + step * np.arange(length)) % VOCABULARY
        builder.add_document(torch.from_numpy(document), [int(length)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def small_config(corpus: str, *, mode: tuple[bool, int] = (False, 1), **changes) -> Config:
    """An expert-choice model of two shared layers, three recursions; `changes` are fields by name."""
    bf16, zero_stage = mode
    config = Config(
        model=ModelConfig(
            num_layers=8, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=VOCABULARY
        ),
        recursion=RecursionConfig(num_recursions=3, routing="expert_choice"),
        data=DataConfig(data_path=(corpus,), split="80,20,0", seq_length=24),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_iters=2, lr_decay_iters=20, lr_wsd_decay_iters=8, clip_grad=0.5),
        training=TrainingConfig(
            micro_batch_size=4,
            global_batch_size=8,
            train_iters=20,
            bf16=bf16,
            zero_stage=zero_stage,
            eval_interval=10,
            eval_iters=2,
        ),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(log_interval=5, peak_tflops=1.0),
    )
    sections = {name: {} for name in vars(config)}
    for field, value in changes.items():
        (section,) = [name for name, part in vars(config).items() if hasattr(part, field)]
        sections[section][field] = value
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def save_teacher(path: Path, **changes) -> str:
    """A Llama of random weights, in a directory of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape | changes)).save_pretrained(path)
    return str(path)


def save_tokenizer(path: Path, words: str) -> str:
    """A tokenizer of words: those given, in their order, and as many others as fill the vocabulary."""
    import tokenizers

    words = ["<unk>", "</s>", *words.split()]
    words += [f"word{number}" for number in range(VOCABULARY - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    return str(path)


def read_metrics(directory: str | Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run: the times."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def read_weights(directory: str | Path, iteration: int) -> dict[str, torch.Tensor]:
    """The model's weights and buffers in a checkpoint."""
    path = Path(directory) / f"iter_{iteration:07d}"
    return read_parameters(path) | read_buffers(path)


def read_state(directory: str | Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by kind and name."""
    reader = open_checkpoint(Path(directory) / f"iter_{iteration:07d}")
    return {
        f"{kind} {name}": torch.tensor(reader.scalar(name)) if kind == STEP else reader.whole(kind, name)
        for name, kinds in reader.kinds.items()
        for kind in kinds
    }


def flip_last_bit(path: Path) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def run_program(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    """Run a program with the repository importable and one thread a rank; on a timeout its children go with it."""
    # Launchers find python through PATH, activated environment or not.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "PATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def assert_same_checkpoint(one: str | Path, other: str | Path, iteration: int) -> None:
    """Weights, buffers and optimizer state of two runs are equal bit for bit."""
    left, right = read_state(one, iteration), read_state(other, iteration)
    assert left.keys() == right.keys()
    assert len({key.split()[0] for key in left}) > 1, "there is no optimizer state"
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"
