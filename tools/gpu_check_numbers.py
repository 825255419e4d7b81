"""The stages of `gpu_check.py` that compare numbers: with the CPU's, with the authors', with one process."""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, RecursionConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.training.engine import build_engine
from mor_megatron.training.train_step import train_step

if TYPE_CHECKING:
    from gpu_check import Row, Run

ROOT = Path(__file__).parents[1]
EXPECTED = Path(__file__).parent / "gpu_check_expected.json"

EXPERT = {"num_recursions": 3, "routing": "expert_choice"}
TOKEN = {"num_recursions": 3, "routing": "token_choice"}
MODELS: dict[str, dict] = {
    "vanilla": {},
    "recursive": {"num_recursions": 3},
    "expert": EXPERT,
    "expert, sharing": EXPERT | {"kv_mode": "sharing"},
    "expert, sharing_update": EXPERT | {"kv_mode": "sharing_update"},
    "token": TOKEN,
    "token, sharing": TOKEN | {"kv_mode": "sharing"},
}
DOCUMENTS = ("vanilla", "expert", "expert, sharing", "token, sharing")
"""Models that are also compared with documents kept apart."""
SEQ_LENGTH, VOCABULARY, MICRO_BATCH = 320, 128, 4
SKETCH = 32
"""Random directions on which a gradient is projected: enough to know the norm of a difference to 12%."""

FP32_TOL = 1e-4
"""Relative difference of all gradients in fp32 on two devices: each kernel sums in its own order."""
BF16_TOL = 0.05
"""The same between bf16 and fp32. On a CPU it is 0.007 to 0.008, including tokens near the boundary that are routed
differently. Without the causal mask it would be 0.7, with keys shifted by one 0.4."""
FIRST_LOSS_TOL = 2e-3
"""Relative difference of the first loss of two bf16 runs: the same weights, products rounded to 8 bits."""
LAST_LOSS_TOL = 0.02
"""Relative difference of the mean loss of the last quarter, when the runs have diverged."""
CURVE_MODELS, CURVE_ITERATIONS = ("vanilla", "expert"), 100


def config_of(model: str, bf16: bool) -> Config:
    """A small model with heads of width 64, as the presets have."""
    return validate(
        Config(
            model=ModelConfig(
                num_layers=8,
                hidden_size=128,
                ffn_hidden_size=256,
                num_attention_heads=2,
                max_position_embeddings=SEQ_LENGTH,
                vocab_size=VOCABULARY,
            ),
            recursion=RecursionConfig(**MODELS[model]),
            data=DataConfig(seq_length=SEQ_LENGTH),
            training=TrainingConfig(micro_batch_size=MICRO_BATCH, bf16=bf16),
        )
    )


def walk(step: int) -> Batch:
    """A random walk through the vocabulary: the next token is one of four."""
    generator = torch.Generator().manual_seed(step)
    jumps = torch.randint(1, 5, (MICRO_BATCH, SEQ_LENGTH + 1), generator=generator)
    tokens = jumps.cumsum(1) % VOCABULARY
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def with_documents(batch: Batch) -> Batch:
    """The same tokens as documents of unequal lengths, positions counted from each one's start."""
    starts = torch.zeros_like(batch.tokens)
    for sequence, every in enumerate((37, 100, 151, SEQ_LENGTH)[:MICRO_BATCH]):
        starts[sequence, ::every] = 1
    positions = torch.arange(SEQ_LENGTH).expand_as(starts)
    begins = torch.where(starts == 1, positions, 0).cummax(1).values
    return Batch(batch.tokens, batch.labels, None, positions - begins, starts.cumsum(1) - 1)


def cases() -> Iterator[tuple[str, str, Batch]]:
    """Name, model and batch of each comparison."""
    for model in MODELS:
        yield model, model, walk(1)
    for model in DOCUMENTS:
        yield f"{model}, documents", model, with_documents(walk(1))


def summary(model: str, batch: Batch, bf16: bool) -> dict:
    """The loss, the norm of each parameter's gradient, and a sketch of all of them, in fp64 on the CPU."""
    config = config_of(model, bf16)
    initialize_distributed(config)
    network = build_model(config)
    loss = network(batch.to(device())).mean()
    loss.backward()
    gradients = {name: p.grad.double().cpu().view(-1) for name, p in sorted(network.named_parameters())}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    return {"loss": loss.item(), "norms": norms, "sketch": _sketch(torch.cat(list(gradients.values()))).tolist()}


def _sketch(gradient: Tensor) -> Tensor:
    """Products of the gradient with random signs: their mean square is the square of its norm."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, gradient.shape, generator=generator).mul_(2).sub_(1) for _ in range(SKETCH))
    return torch.stack([gradient @ row.double() for row in signs])


def compare(ours: dict, expected: dict, tolerance: float) -> Row:
    """Relative difference of two summaries, and whose gradient's norm differs most."""
    a, b = (torch.tensor(x["sketch"], dtype=torch.float64) for x in (ours, expected))
    difference = ((a - b).norm() / b.norm()).item()
    worst = max(ours["norms"], key=lambda name: abs(ours["norms"][name] / max(expected["norms"][name], 1e-12) - 1))
    return {
        "loss": ours["loss"],
        "loss difference": abs(ours["loss"] / expected["loss"] - 1),
        "gradient difference": difference,
        "limit": tolerance,
        "largest in": worst,
        "failed": not difference <= tolerance,
    }


def gradients(run: Run) -> Iterator[Row]:
    """A row for each model and precision, against the CPU's fp32."""
    expected = json.loads(EXPECTED.read_text())["gradients"]
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, model, batch in cases():
        if run.small and name not in ("expert", "token, sharing, documents"):
            continue
        for bf16 in (False,) if run.small else (False, True):
            row: Row = {"model": name, "precision": "bf16" if bf16 else "fp32"}
            yield row | compare(summary(model, batch, bf16), expected[name], BF16_TOL if bf16 else FP32_TOL)


def reference(run: Run) -> Iterator[Row]:
    """The tests of `tests/reference` on three of the authors' cases."""
    sys.path.insert(0, str(ROOT / "tests" / "reference"))
    import test_reference
    from authors import load_case

    initialize_distributed(Config())
    tests = [test for name, test in vars(test_reference).items() if name.startswith("test_") and _takes_a_case(test)]
    found = sorted((ROOT / "tests" / "reference" / "data").glob("*.safetensors"))
    wanted = ("mor_expert_nr3_mlp",) if run.small else ("mor_expert_nr3_mlp", "mor_token", "vanilla")
    for name in wanted:
        path = next((path for path in found if path.stem.startswith(name)), None)
        assert path is not None, f"no reference case {name}"
        failures = []
        for test in tests:
            try:
                test(load_case(path))
            except Exception as error:  # each test is counted
                if type(error).__name__ != "Skipped":
                    failures.append(f"{test.__name__}: {error}"[:300])
        row: Row = {"case": path.stem, "tests": len(tests), "failed tests": len(failures), "failed": bool(failures)}
        yield row | ({"output": "\n".join(failures)} if failures else {})


def _takes_a_case(test) -> bool:
    return test.__code__.co_varnames[: test.__code__.co_argcount] == ("case",)


def losses_of(model: str, iterations: int) -> list[float]:
    """Losses of a small model that learns the walk in bf16."""
    config = config_of(model, bf16=True)
    initialize_distributed(config)
    engine = build_engine(build_model(config), config)
    engine.module.train()
    steps = range(1, iterations + 1)
    return [
        train_step(engine, iter([walk(step)]), config, step, lr=3e-3 * min(1.0, step / 10)).lm_loss for step in steps
    ]


def curves(run: Run) -> Iterator[Row]:
    """A row for each model, with both curves."""
    expected = json.loads(EXPECTED.read_text())["curves"]
    for model in CURVE_MODELS[-1:] if run.small else CURVE_MODELS:
        count = 3 if run.small else CURVE_ITERATIONS
        yield {"model": model} | compare_curves(losses_of(model, count), expected[model][:count])


def compare_curves(ours: list[float], expected: list[float]) -> Row:
    """Relative differences of the first loss and of the mean of the last quarter, and whether they are too large."""
    quarter = max(1, len(expected) // 4)
    ends = [statistics.fmean(losses[-quarter:]) for losses in (ours, expected)]
    first, last = (abs(a / b - 1) for a, b in ((ours[0], expected[0]), ends))
    return {
        "first loss": ours[0],
        "first difference": first,
        "last loss": ends[0],
        "last difference": last,
        "failed": not (first <= FIRST_LOSS_TOL and last <= LAST_LOSS_TOL),
        "losses": ours,
        "losses on the CPU": expected,
    }


def layouts(run: Run) -> Iterator[Row]:
    """The small models of `tests/distributed` in each layout that has enough GPUs, against this process."""
    ranks = 2 if run.small else torch.cuda.device_count()
    if ranks == 1:
        yield {"skipped": "one GPU"}
        return
    sys.path[:0] = [str(ROOT / "tests" / "distributed"), str(ROOT / "tests")]
    from layout_runs import train
    from table import LAYOUTS, MODELS, ONE, build_config

    chosen = [layout for layout in LAYOUTS if layout.world_size in range(2, ranks + 1)]
    models, chosen = (["expert-nr3"], chosen[:1]) if run.small else (list(MODELS), chosen)
    with tempfile.TemporaryDirectory() as results:
        for size in {layout.global_batch for layout in chosen}:
            for model in models:
                alone = train(build_config(model, replace(ONE, global_batch=size)))
                Path(results, f"{model}-{size}.pickle").write_bytes(pickle.dumps(alone))
        for layout in chosen:
            yield from _layout(layout.name, layout.world_size, models, results)


def _layout(name: str, ranks: int, models: list[str], results: str) -> list[Row]:
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    job += [str(Path(__file__).parent / "gpu_check_layouts.py"), name, results, *models]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *job], env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        rows.append({"layout": name, "failed": True, "output": (done.stdout + done.stderr)[-3000:]})
    return rows


def write_expected() -> None:
    """Compute on this CPU what a GPU is compared with, in fp32 but for the curves."""
    assert device().type == "cpu"
    found = {
        "torch": torch.__version__,
        "gradients": {name: summary(model, batch, bf16=False) for name, model, batch in cases()},
        "curves": {model: losses_of(model, CURVE_ITERATIONS) for model in CURVE_MODELS},
    }
    EXPECTED.write_text(json.dumps(_rounded(found), indent=None, separators=(",", ":")) + "\n")


def _rounded(value):
    """Floats with 9 digits, far below every tolerance, for a small file."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
