"""How accurate the accumulated gradient of a tied layer is in a bf16 run, in every mode of the training step.

The same weights (rounded to bf16 first) and data go through an fp32 run and through bf16 runs: the schedule with ZeRO 0
and 1, DeepSpeed's backward with ZeRO 2 and 3. After 1, 2, 4, ... micro-batches the gradient of the shared block, which
is used Nr times in each, is compared with that of the fp32 run: |g - g_fp32| / |g_fp32|. For comparison:

- `naive`: the same bf16 run with gradients summed in bf16, PyTorch's default;
- `untied`: a model of as many layers with separate weights, each used once;
- `sum`: the largest distance of a mode from the fp64 sum of its own micro-batches' gradients. The rest of the error is
  therefore bf16 arithmetic in forward and backward.

One process: a reduction over ranks adds fp32 numbers once more. Tokens are Zipf-distributed, so that micro-batches
share a part of the gradient, as real ones do. No token is routed, because rounding could change its route.

    python benchmarks/gradient_precision.py --output precision.json --plot docs/gradient_precision.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from processor import processor
from torch import Tensor, nn

from mor_megatron.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, RecursionConfig, TrainingConfig
from mor_megatron.config.validate import validate
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.model.mor_model import build_model
from mor_megatron.pipeline.schedule import run_schedule
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.training.engine import Engine, build_engine, choose_driver
from mor_megatron.training.modes.sharded import ShardedGradients

VOCABULARY, HIDDEN, SEQ_LENGTH, BLOCK = 512, 128, 64, 2
BRANCHES = {"schedule, ZeRO 0": 0, "schedule, ZeRO 1": 1, "engine, ZeRO 2": 2, "engine, ZeRO 3": 3}
NAIVE, UNTIED, SUM = "naive", "untied", "sum"


def make_config(num_recursions: int, zero_stage: int, bf16: bool, deepspeed_config: str, tied: bool = True) -> Config:
    """A recursive model whose block of BLOCK layers is used `num_recursions` times, or an untied one of equal depth."""
    return validate(
        Config(
            model=ModelConfig(
                num_layers=2 + BLOCK * num_recursions,
                hidden_size=HIDDEN,
                ffn_hidden_size=3 * HIDDEN,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
            ),
            recursion=RecursionConfig(num_recursions=num_recursions if tied else 1),
            data=DataConfig(seq_length=SEQ_LENGTH),
            optimizer=OptimizerConfig(optimizer="sgd"),
            training=TrainingConfig(
                micro_batch_size=1, bf16=bf16, zero_stage=zero_stage, eval_iters=0, deepspeed_config=deepspeed_config
            ),
        )
    )


def micro_batches(count: int) -> Iterator[Batch]:
    """Sequences in which the token of rank r occurs in proportion to 1/r."""
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, VOCABULARY + 1)
    for _ in range(count):
        tokens = torch.multinomial(weights, SEQ_LENGTH + 1, replacement=True, generator=generator).unsqueeze(0)
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def build(config: Config, naive: bool = False) -> tuple[Engine, list[nn.Parameter]]:
    """An engine in training mode, and the parameters of the layers between the first and the last."""
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    engine = build_engine(model, config)
    engine.module.train()
    block = [parameter for layer in list(model.layers.values())[1:-1] for parameter in layer.parameters()]
    if naive:
        for parameter in model.parameters():
            parameter.grad_dtype = parameter.dtype
    return engine, block


def read(engine: Engine, block: list[nn.Parameter]) -> Tensor:
    """The accumulated gradient of the block, as one fp64 vector."""
    gradients = engine.gradient_shards() if isinstance(engine, ShardedGradients) else engine.gradients()
    by_parameter = {id(parameter): gradient for parameter, gradient in gradients}
    return torch.cat([by_parameter[id(parameter)].reshape(-1).double() for parameter in block])


def accumulate(engine: Engine, config: Config, batch: Batch) -> None:
    """One micro-batch forward and backward, in the mode of this configuration."""

    def loss(losses: Tensor, batch: Batch) -> Tensor:
        return losses.mean(dtype=torch.float64)

    if choose_driver(config) == "schedule":
        run_schedule(engine.module, [batch], 1, RoutingContext, loss)
    else:
        engine.backward(loss(engine.forward(batch, RoutingContext()), batch))


def gradients_after(counts: list[int], config: Config, naive: bool = False) -> tuple[dict[int, Tensor], Tensor]:
    """Accumulated gradient at each number of micro-batches; at the last, also the fp64 sum of single gradients."""
    engine, block = build(config, naive)
    snapshots: dict[int, Tensor] = {}
    for done, batch in enumerate(micro_batches(counts[-1]), 1):
        accumulate(engine, config, batch)
        if done in counts:
            snapshots[done] = read(engine, block)
    total = torch.zeros_like(snapshots[counts[0]])
    if config.training.bf16 and config.training.zero_stage == 0:
        for batch in micro_batches(counts[-1]):
            engine.discard()
            accumulate(engine, config, batch)
            total += read(engine, block)
    return snapshots, total


def relative(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|."""
    return ((got - exact).norm() / exact.norm()).item()


def measure(recursions: list[int], counts: list[int], say: Callable[[str], None]) -> list[dict]:
    """One row for each number of recursions and of micro-batches, with the error of every mode."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        # Otherwise ZeRO-3 would keep such small weights on every rank.
        file = Path(directory) / "zero3.json"
        file.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        for nr in recursions:
            start = time.perf_counter()
            exact, _ = gradients_after(counts, make_config(nr, 0, False, str(file)))
            runs, sums = {}, {}
            for name, stage in BRANCHES.items():
                runs[name], sums[name] = gradients_after(counts, make_config(nr, stage, True, str(file)))
            runs[NAIVE], _ = gradients_after(counts, make_config(nr, 0, True, str(file)), naive=True)
            untied = [gradients_after(counts, make_config(nr, 0, b, str(file), tied=False))[0] for b in (True, False)]
            own_sum = sums["schedule, ZeRO 0"]
            for count in counts:
                errors = {name: relative(snapshots[count], exact[count]) for name, snapshots in runs.items()}
                if count == counts[-1]:
                    errors[UNTIED] = relative(untied[0][count], untied[1][count])
                    errors[SUM] = max(relative(runs[name][count], own_sum) for name in BRANCHES)
                rows.append({"num_recursions": nr, "micro_batches": count, "errors": errors})
            say(f"Nr={nr}: {time.perf_counter() - start:.0f} s")
    return rows


def table(rows: list[dict]) -> str:
    """Rows as text."""
    names = [*BRANCHES, NAIVE, UNTIED, SUM]
    lines = [f"{'Nr':>2} {'micro-batches':>13} " + " ".join(f"{name:>16}" for name in names)]
    for row in rows:
        cells = [f"{row['errors'][name]:16.2e}" if name in row["errors"] else " " * 16 for name in names]
        lines.append(f"{row['num_recursions']:>2} {row['micro_batches']:>13} " + " ".join(cells))
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """One panel for each number of recursions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recursions = sorted({row["num_recursions"] for row in rows})
    counts = sorted({row["micro_batches"] for row in rows})
    figure, axes = pyplot.subplots(1, len(recursions), figsize=(2.4 * len(recursions), 2.9), sharey=True, squeeze=False)
    styles = dict(zip(BRANCHES, ("o-", "s--", "^:", "x-."), strict=True)) | {NAIVE: "k-"}
    for axis, nr in zip(axes[0], recursions, strict=True):
        these = [row for row in rows if row["num_recursions"] == nr]
        for name, style in styles.items():
            percent = [100 * row["errors"][name] for row in these]
            label = "summed in bf16 (naive)" if name == NAIVE else name
            axis.plot(counts, percent, style, label=label, markersize=4, linewidth=1)
        axis.set(title=f"Nr = {nr}", xlabel="micro-batches", xscale="log")
        axis.set_xticks(counts[::2], [str(count) for count in counts[::2]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="relative error, %", ylim=(0, None))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=len(styles), fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recursions", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=64,
        help="largest number of micro-batches; the others are obtained by halving it",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--plot", help="PNG file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    counts = [2**i for i in range(args.micro_batches.bit_length()) if 2**i <= args.micro_batches]
    initialize_distributed(Config())
    print(
        f"gradient of {BLOCK} tied layers of width {HIDDEN}, bf16 against fp32; {processor()}, {args.threads} threads, "
        + ", ".join(f"{package} {version(package)}" for package in ("torch", "megatron-core", "deepspeed")),
        flush=True,
    )
    rows = measure(args.recursions, counts, lambda line: print(line, flush=True))
    print(table(rows))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
