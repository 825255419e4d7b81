"""Speed of generation: our exported models and Hugging Face's Llama.

All models are built first and then take turns, one call of `generate` each per round and batch size, so a drift of the
machine's speed affects all of them; medians over rounds are compared. Weights are untrained. Routers are shifted until
they keep the fractions of training (1, 2/3, 1/3), and tokens are sampled, so that these fractions last.

    OMP_NUM_THREADS=1 python benchmarks/generate.py --output generate.json

Time is the CPU time of the process unless `--clock wall` is given. With one thread, the two are equal on an idle
machine; on a shared one, CPU time is more accurate. FLOPs are those of `mor_megatron.planning.accounting`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from processor import processor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from mor_megatron.huggingface.cache_mor import MoRCache
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.convert_config import training_config
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.planning.accounting import head_flops_per_token, layer_flops_per_token, router_flops_per_token

HF, VANILLA = "hf_llama", "vanilla"
RECURSIONS = 3
MODELS = {
    VANILLA: {},
    "recursive": {"num_recursions": RECURSIONS},
    "expert": {"num_recursions": RECURSIONS, "routing": "expert_choice"},
    "expert_sharing": {"num_recursions": RECURSIONS, "routing": "expert_choice", "kv_mode": "sharing"},
    # Loss-free balancing has a bias, which can make the depths of untrained weights equally frequent.
    "token": {"num_recursions": RECURSIONS, "routing": "token_choice", "router_balance": "loss_free"},
    "token_sharing": {
        "num_recursions": RECURSIONS,
        "routing": "token_choice",
        "router_balance": "loss_free",
        "kv_mode": "sharing",
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


class Ticks(BaseStreamer):
    """Records the time of each step: the prompt, then every new token."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


@dataclass
class Contender:
    """One model and its measurements: by batch size, one value per round."""

    name: str
    model: MoRForCausalLM | LlamaForCausalLM
    first: dict[int, list[float]] = field(default_factory=dict)
    """Seconds to the first token."""
    rest: dict[int, list[float]] = field(default_factory=dict)
    """Seconds for all tokens after the first."""
    fractions: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    """Number of tokens at each recursion, of prompt and continuation."""
    block_rows: dict[int, list[int]] = field(default_factory=dict)
    """(token, layer) pairs with keys and values, without the unique first and last layer."""
    nbytes: dict[int, list[int]] = field(default_factory=dict)
    """Bytes of all key and value buffers."""

    def run(self, prompt: torch.Tensor, new: int, clock: Callable[[], float], warming: bool) -> None:
        """Generate once."""
        batch = len(prompt)
        is_ours = self.name != HF
        cache = MoRCache(self.model.config) if is_ours else DynamicCache(config=self.model.config)
        ticks = Ticks(clock)
        torch.manual_seed(1)
        start = clock()
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            cache=cache,
            streamer=ticks,
            pad_token_id=0,
        )
        if warming:
            return
        assert len(ticks.times) == 1 + new
        self.first.setdefault(batch, []).append(ticks.times[1] - start)
        self.rest.setdefault(batch, []).append(ticks.times[-1] - ticks.times[1])
        if is_ours:
            count = self.model.config.num_recursions
            fractions = tuple((cache.depths > r).float().mean().item() for r in range(count))
            self.fractions.setdefault(batch, []).append(fractions)
            self.block_rows.setdefault(batch, []).append(cache.num_rows() - 2 * sum(cache.lengths))
            self.nbytes.setdefault(batch, []).append(cache.nbytes())

    def mean_fractions(self, batch: int) -> tuple[float, ...]:
        """Median over the rounds."""
        return tuple(map(statistics.mean, zip(*self.fractions[batch], strict=True)))


def build(name: str, args: argparse.Namespace, prompt: torch.Tensor) -> Contender:
    """Build a model with untrained weights, and set its routers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.hidden_size // 64,
        "max_position_embeddings": args.prompt + args.new,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    if name == HF:
        model = LlamaForCausalLM(LlamaConfig(eos_token_id=None, **sizes)).eval()
        return Contender(name, model.to(prompt.device, DTYPES[args.dtype]))
    model = MoRForCausalLM(MoRConfig(**sizes, **MODELS[name])).eval().to(prompt.device)
    with torch.no_grad():
        if model.config.routing == "expert_choice":
            shift_routers(model, prompt)
        elif model.config.routing == "token_choice":
            balance_depths(model, prompt)
    return Contender(name, model.to(DTYPES[args.dtype]))


def shift_routers(model: MoRForCausalLM, prompt: torch.Tensor) -> None:
    """Make recursion r keep its capacity of the tokens.

    The routers have no bias, so a constant channel of the embedding serves as one. In the tied head, it adds the same
    value to every logit.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    seen: dict[int, torch.Tensor] = {}
    routers = model.model.router.routers
    for r, router in enumerate(routers):
        router.register_forward_hook(lambda module, inputs, output, r=r: seen.__setitem__(r, inputs[0]))
    for r in range(1, len(routers)):
        model.model(prompt)
        x, weight = seen[r], routers[r].out.weight
        logits = (x @ weight.t()).squeeze(1)
        wanted = model.config.capacity[r] / model.config.capacity[r - 1]
        # logit + shift * x[0] >= 0 for the wanted fraction
        weight[0, 0] -= torch.quantile(logits / x[:, 0], 1.0 - wanted)
    for router in routers:
        router._forward_hooks.clear()


def balance_depths(model: MoRForCausalLM, prompt: torch.Tensor) -> None:
    """Set the bias of loss-free balancing so that tokens choose all depths equally often."""
    choice = model.model.router
    logits: list[torch.Tensor] = []
    handle = choice.router.register_forward_hook(lambda module, inputs, output: logits.append(output))
    model.model(prompt)
    handle.remove()
    scores = torch.softmax(logits[0], dim=-1)
    for step in range(400):
        depth = (scores + choice.balance_bias).argmax(-1)
        fractions = torch.bincount(depth, minlength=scores.shape[1]).float() / len(depth)
        choice.balance_bias -= 0.2 * 0.985**step * (fractions - fractions.mean())


def prefill_flops(contender: Contender, batch: int, args: argparse.Namespace) -> float:
    """FLOPs of the prompt: all layers and routers, and the head once per sequence."""
    config = training_config(contender.model.config)
    config = replace(config, data=replace(config.data, seq_length=args.prompt))
    fractions = contender.mean_fractions(batch)
    layers = sum(layer_flops_per_token(config, fractions)) + router_flops_per_token(config, fractions)
    return batch * (args.prompt * layers + head_flops_per_token(config))


def measure(args: argparse.Namespace) -> list[dict]:
    """Rows of the table."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.randint(0, args.vocab_size, (max(args.batch_sizes), args.prompt), generator=generator)
    largest = largest.to(args.device)
    chosen = [HF, *MODELS] if args.models is None else args.models
    contenders = [build(name, args, largest[:8]) for name in chosen]
    clock = CLOCKS[args.clock]
    for contender in contenders:
        contender.run(largest[:1], 8, clock, warming=True)
    for batch, rounds in zip(args.batch_sizes, args.rounds, strict=True):
        for number in range(rounds):
            prompt = largest.roll(-number, 0)[:batch]  # new sequences, because the depths of a single one vary
            for contender in contenders:
                contender.run(prompt, args.new, clock, warming=False)
        print(f"batch {batch}: {rounds} rounds done", flush=True)
    vanilla = next(contender for contender in contenders if contender.name == VANILLA)
    return [row(c, vanilla, batch, args) for batch in args.batch_sizes for c in contenders]


def row(contender: Contender, vanilla: Contender, batch: int, args: argparse.Namespace) -> dict:
    """Medians of one model at one batch size; ratios are medians of the ratios within a round."""
    first, rest = contender.first[batch], contender.rest[batch]
    facts = {
        "batch": batch,
        "model": contender.name,
        "first_token_seconds": statistics.median(first),
        "decode_tokens_per_second": batch * (args.new - 1) / statistics.median(rest),
        "tokens_per_second": batch * args.new / statistics.median(a + b for a, b in zip(first, rest, strict=True)),
        "spread": (max(rest) - min(rest)) / statistics.median(rest),
        "first_to_vanilla": _ratio(first, vanilla.first[batch]),
        "decode_to_vanilla": _ratio(rest, vanilla.rest[batch]),
    }
    if contender.name != HF:
        flops = prefill_flops(contender, batch, args) / prefill_flops(vanilla, batch, args)
        facts |= {
            "prefill_flops_to_vanilla": flops,
            "mean_depth": sum(contender.mean_fractions(batch)),
            "block_rows_to_vanilla": sum(contender.block_rows[batch]) / sum(vanilla.block_rows[batch]),
            "kv_bytes_to_vanilla": sum(contender.nbytes[batch]) / sum(vanilla.nbytes[batch]),
        }
    return facts


def _ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def print_table(rows: list[dict]) -> None:
    """A table with one line per model and batch size."""
    print(
        f"{'batch':>5} {'model':15} {'first s':>8} {'decode tok/s':>12} {'spread':>6} {'first/van':>9} {'F/van':>6} "
        f"{'(t/F)':>6} {'decode/van':>10} {'depth':>6} {'block KV':>8} {'KV bytes':>8}"
    )
    for r in rows:
        line = (
            f"{r['batch']:5} {r['model']:15} {r['first_token_seconds']:8.3f} {r['decode_tokens_per_second']:12.1f} "
            f"{r['spread']:6.0%} {r['first_to_vanilla']:9.2f}"
        )
        if r["model"] == HF:
            print(f"{line} {'':6} {'':6} {r['decode_to_vanilla']:10.2f}")
            continue
        flops = r["prefill_flops_to_vanilla"]
        print(
            f"{line} {flops:6.2f} {r['first_to_vanilla'] / flops:6.2f} {r['decode_to_vanilla']:10.2f} "
            f"{r['mean_depth']:6.2f} {r['block_rows_to_vanilla']:8.3f} {r['kv_bytes_to_vanilla']:8.3f}"
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[HF, *MODELS], help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", nargs="+", type=int, default=[5, 3, 2], help="number of rounds for each batch size")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs --clock wall")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(argv)
    if len(args.rounds) != len(args.batch_sizes):
        parser.error(
            f"--rounds has {len(args.rounds)} values: give one for each of {len(args.batch_sizes)} batch sizes"
        )
    if args.models is not None and VANILLA not in args.models:
        parser.error("--models needs vanilla, with which the others are compared")
    return args


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    machine = (
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, {args.num_layers} layers, "
        f"vocabulary {args.vocab_size}, {args.dtype}, prompt {args.prompt}, {args.new} new tokens; interleaved rounds "
        f"{args.rounds} at batch {args.batch_sizes}, medians of {args.clock} time"
    )
    print(machine, flush=True)
    rows = measure(args)
    print_table(rows)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
