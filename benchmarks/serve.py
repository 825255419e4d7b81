"""Speed of the engine, beside `generate` on static batches.

All contenders take turns within a round, so a drift of the machine's speed affects all of them. Weights are untrained;
routers are shifted until they keep the fractions of training (1, 2/3, 1/3). Every request has a random prompt and a
fixed number of new tokens. Tokens are sampled, because greedy decoding would repeat one token and its depth.

    OMP_NUM_THREADS=1 python benchmarks/serve.py --output serve.json

`generate` gets the requests in batches of as many as the engine has lanes, padded to the longest prompt, and runs each
batch until its longest request is done; only the tokens that were asked for are counted. Time is the CPU time of the
process unless `--clock wall` is given.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from generate import CLOCKS, VANILLA, balance_depths, shift_routers
from processor import processor

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.serving import Engine, EngineOptions, SamplingParams

RECURSIONS = 3
_EXPERT = {"num_recursions": RECURSIONS, "routing": "expert_choice"}
# Loss-free balancing has a bias, which can make the depths of untrained weights equally frequent.
_TOKEN = {"num_recursions": RECURSIONS, "routing": "token_choice", "router_balance": "loss_free"}
MODELS = {
    VANILLA: {},
    "recursive": {"num_recursions": RECURSIONS},
    "expert": _EXPERT,
    "expert_sharing": {**_EXPERT, "kv_mode": "sharing"},
    "token": _TOKEN,
    "token_sharing": {**_TOKEN, "kv_mode": "sharing"},
}
STATIC = "generate"


@dataclass(frozen=True)
class Work:
    """One request."""

    prompt: list[int]
    new: int


@dataclass
class Contender:
    """One model run in one way, and its measurements, one value a round."""

    name: str
    model: MoRForCausalLM
    lanes: int
    turn_at: int | None
    """None: `generate` on static batches."""
    seconds: list[float] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    def run(self, works: list[Work], args: argparse.Namespace) -> int:
        """All requests; gives the number of tokens generated."""
        if self.turn_at is None:
            return self._generate(works)
        options = EngineOptions(
            lanes=self.lanes, turn_at=self.turn_at, chunk=args.chunk, page_size=args.page_size, prefix_cache=False
        )
        engine = Engine(self.model, None, options)
        requests = [
            engine.add(w.prompt, SamplingParams(max_tokens=w.new, temperature=1.0, seed=i)) for i, w in enumerate(works)
        ]
        engine.drain()
        rounds = sum(work.new for work in works) / self.lanes
        self.facts = {
            "mean_depth": statistics.mean(depth for request in requests for depth in request.depths),
            "passes_per_round": engine.runner.passes / rounds,
            "turns_per_round": engine.runner.turns / rounds,
            "peak_pages": sum(pages.most * len(pages.layers) for pages in engine.store.kinds),
        }
        return sum(len(request.generated) for request in requests)

    def _generate(self, works: list[Work]) -> int:
        torch.manual_seed(1)
        for start in range(0, len(works), self.lanes):
            batch = works[start : start + self.lanes]
            longest, new = max(len(w.prompt) for w in batch), max(w.new for w in batch)
            ids = torch.tensor([[0] * (longest - len(w.prompt)) + w.prompt for w in batch])
            mask = torch.tensor([[0] * (longest - len(w.prompt)) + [1] * len(w.prompt) for w in batch])
            self.model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        return sum(work.new for work in works)


def build(name: str, args: argparse.Namespace) -> MoRForCausalLM:
    """A model with untrained weights, its routers set."""
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=2 + RECURSIONS * args.block,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=args.prompt[1] + args.new[1],
        attn_implementation="sdpa",
        **MODELS[name],
    )
    model = MoRForCausalLM(config).eval()
    sample = torch.randint(0, args.vocab_size, (8, args.prompt[1]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if config.routing == "expert_choice":
            shift_routers(model, sample)
        elif config.routing == "token_choice":
            balance_depths(model, sample)
    return model


def requests(count: int, seed: int, args: argparse.Namespace) -> list[Work]:
    """Prompts and lengths of one round."""
    r = random.Random(seed)
    lengths = [(r.randint(*args.prompt), r.randint(*args.new)) for _ in range(count)]
    return [Work([r.randrange(args.vocab_size) for _ in range(n)], new) for n, new in lengths]


def measure(args: argparse.Namespace) -> list[dict]:
    """One row for each contender."""
    models = {name: build(name, args) for name in args.models}
    clock, rows = CLOCKS[args.clock], []
    gc.freeze()  # as a server would: no pass over all modules within a step
    for lanes in args.lanes:
        turns = sorted({1, max(1, lanes // 4), lanes // 2, lanes})
        contenders = [
            Contender(name, model, lanes, turn_at)
            for name, model in models.items()
            for turn_at in ([None] if args.static else []) + ([lanes // 2] if name == VANILLA else turns)
        ]
        for contender in contenders:
            contender.run(requests(2, 0, args), args)
        for number in range(args.rounds):
            works = requests(args.waves * lanes, number + 1, args)
            for contender in contenders:
                start = clock()
                tokens = contender.run(works, args)
                contender.seconds.append((clock() - start) / tokens)
        base = next(c for c in contenders if c.name == args.models[0] and c.turn_at is not None)
        rows += (new := [row(contender, base, contenders) for contender in contenders])
        print_table(new, base.name)
    return rows


def row(contender: Contender, base: Contender, all_of_them: list[Contender]) -> dict:
    """Medians; ratios are medians of the ratios within a round."""
    static = next((c for c in all_of_them if c.name == contender.name and c.turn_at is None), None)
    return {
        "lanes": contender.lanes,
        "model": contender.name,
        "turn_at": contender.turn_at,
        "tokens_per_second": 1.0 / statistics.median(contender.seconds),
        "spread": (max(contender.seconds) - min(contender.seconds)) / statistics.median(contender.seconds),
        "over_base": _ratio(base.seconds, contender.seconds),
        "over_static": None if static is None else _ratio(static.seconds, contender.seconds),
        "pages_to_base": contender.facts.get("peak_pages", 0) / base.facts["peak_pages"],
        **contender.facts,
    }


def _ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def print_table(rows: list[dict], base: str) -> None:
    """A line for each contender."""
    print(
        f"{'lanes':>5} {'model':15} {'turn at':>8} {'tok/s':>8} {'spread':>6} {'/' + base:>8} {'/static':>7} "
        f"{'depth':>5} {'passes':>6} {'turns':>5} {'pages':>5}"
    )
    for r in rows:
        static = "" if r["over_static"] is None else f"{r['over_static']:.2f}"
        line = (
            f"{r['lanes']:5} {r['model']:15} {r['turn_at'] or STATIC:>8} {r['tokens_per_second']:8.1f} "
            f"{r['spread']:6.0%} {r['over_base']:8.2f} {static:>7}"
        )
        if r["turn_at"] is not None:
            line += (
                f" {r['mean_depth']:5.2f} {r['passes_per_round']:6.2f} {r['turns_per_round']:5.2f} "
                f"{r['pages_to_base']:5.2f}"
            )
        print(line, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="the first is the base of ratios"
    )
    parser.add_argument("--lanes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--waves", type=int, default=2, help="requests for each lane")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", nargs=2, type=int, default=[64, 256], help="fewest and most tokens")
    parser.add_argument("--new", nargs=2, type=int, default=[32, 128], help="fewest and most tokens")
    parser.add_argument("--block", type=int, default=2, help="layers of the block; vanilla has as many unrolled layers")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave out `generate`")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    machine = (
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, block of {args.block}, "
        f"vocabulary {args.vocab_size}, prompts {args.prompt}, new {args.new}, {args.waves} requests a lane; "
        f"{args.rounds} interleaved rounds, medians of {args.clock} time"
    )
    print(machine, flush=True)
    rows = measure(args)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
