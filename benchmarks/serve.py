"""Speed of the engine, beside `generate` on static batches, at equal lanes and at equal memory for keys and values.

All contenders take turns within a round, so a drift of the machine's speed affects all of them. Weights are untrained;
routers are shifted until they keep the fractions of training (1, 2/3, 1/3). Prompts and continuations are random, and
the continuations are forced: every contender computes the next token, and then goes on with the one that is given. So
all of them do the same work.

    OMP_NUM_THREADS=1 python benchmarks/serve.py --output serve.json

`generate` gets the requests in batches of as many as the engine has lanes, padded to the longest prompt, and runs each
batch until its longest request is done; only the tokens that were asked for are counted. With equal memory, a model has
the memory that vanilla used at most, and as many more lanes as it needs fewer pages. FLOPs are those that PyTorch's
counter sees in one run. Time is the CPU time of the process unless `--clock wall` is given.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import transformers
from generate import CLOCKS, VANILLA, balance_depths, shift_routers
from processor import processor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LogitsProcessor

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.serving import Engine, EngineOptions, Request, SamplingParams, engine

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
STATIC, AUTO = "generate", "auto"
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Not among what PyTorch's counter knows."""


@dataclass(frozen=True)
class Work:
    """One request."""

    prompt: list[int]
    new: list[int]
    """The continuation."""


class Forced(LogitsProcessor):
    """Makes `generate` take given tokens [B, new]."""

    def __init__(self, tokens: Tensor, begin: int):
        self.tokens, self.begin = tokens, begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.begin
        return scores.scatter(1, self.tokens[:, step : step + 1], float("inf"))


@dataclass
class Contender:
    """One model run in one way, and its measurements, one value a round."""

    name: str
    model: MoRForCausalLM
    lanes: int
    turn_at: int | str
    """`generate` on static batches, automatic, or a number."""
    kv_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    facts: dict = field(default_factory=dict)
    """Of the first run."""

    def run(self, works: list[Work], args: argparse.Namespace, attention: str = "auto") -> float:
        """All requests; gives the seconds they take, without those for making the engine."""
        clock = CLOCKS[args.clock]
        if self.turn_at == STATIC:
            start = clock()
            self._generate(works)
            return clock() - start
        options = EngineOptions(
            lanes=self.lanes,
            turn_at=None if self.turn_at == AUTO else self.turn_at,
            chunk=args.chunk,
            page_size=args.page_size,
            prefix_cache=False,
            kv_bytes=self.kv_bytes,
            attention=attention,
        )
        own = Engine(self.model, None, options)
        given: dict[Request, list[int]] = {}
        passes: dict[Request, list[int]] = {}
        for work in works:
            params = SamplingParams(max_tokens=len(work.new), ignore_eos=True)
            request = own.add(work.prompt, params, lambda event: passes[event.request].append(own.runner.passes))
            given[request], passes[request] = work.new, []
        compute = engine.sample

        def force(logits: Tensor, requests: list[Request], ends: set[int]) -> list[int]:
            compute(logits, requests, ends)
            return [given[request][len(request.tokens) - len(request.prompt)] for request in requests]

        with mock.patch.object(engine, "sample", force):
            start = clock()
            own.drain()
            seconds = clock() - start
        decoded = sum(len(work.new) - 1 for work in works)
        self.facts = self.facts or {
            "decoding_depth": sum(sum(x.depths[len(x.prompt) :]) for x in given) / decoded,
            "passes_per_token": sum(x[-1] - x[0] for x in passes.values()) / decoded,
            "sequences_per_turn": (decoded + len(works)) / own.runner.turns,
            "peak_pages": sum(pages.most * len(pages.layers) for pages in own.store.kinds),
            "preemptions": own.scheduler.preemptions,
            "pass_cost": own.turns.of_pass.line,
            "turn_cost": own.turns.of_turn.line,
        }
        return seconds

    def count_flops(self, works: list[Work], args: argparse.Namespace) -> int:
        """FLOPs of all products and of attention."""
        with FlopCounterMode(display=False, custom_mapping={ATTENTION: attention_flops}) as counter:
            self.run(works, args, "torch")  # the counter does not see what is compiled
        return counter.get_total_flops()

    def _generate(self, works: list[Work]) -> None:
        for start in range(0, len(works), self.lanes):
            batch = works[start : start + self.lanes]
            longest, new = max(len(w.prompt) for w in batch), max(len(w.new) for w in batch)
            ids = torch.tensor([[0] * (longest - len(w.prompt)) + w.prompt for w in batch])
            mask = torch.tensor([[0] * (longest - len(w.prompt)) + [1] * len(w.prompt) for w in batch])
            given = torch.tensor([w.new + w.new[:1] * (new - len(w.new)) for w in batch])
            self.model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                logits_processor=[Forced(given, longest)],
                pad_token_id=0,
            )


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest, **options) -> int:
    """Of scaled_dot_product_attention on a CPU, from the shapes of its arguments."""
    return sdpa_flop_count(query, key, value)


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
    """Prompts and continuations of one round."""
    r = random.Random(seed)
    lengths = [(r.randint(*args.prompt), r.randint(*args.new)) for _ in range(count)]
    return [Work(*([r.randrange(args.vocab_size) for _ in range(n)] for n in pair)) for pair in lengths]


def contenders_of(lanes: int, models: dict[str, MoRForCausalLM], args: argparse.Namespace) -> list[Contender]:
    """All ways to run all models."""
    works, result, pages = requests(args.waves * lanes, 1, args), [], {}
    page = 2 * args.page_size * args.hidden_size * 4  # bytes of a page in one layer
    fixed = sorted({1, max(1, lanes // 4), lanes // 2, lanes}) if args.turn_at is None else args.turn_at
    for name, model in models.items():
        counted = Contender(name, model, lanes, lanes)
        flops = counted.count_flops(works, args)
        pages[name] = counted.facts["peak_pages"]
        here = [Contender(name, model, lanes, AUTO)]
        if name != VANILLA:
            here += [Contender(name, model, lanes, turn_at) for turn_at in fixed]
            if args.equal_memory:
                more = round(lanes * pages[VANILLA] / pages[name])
                here.append(Contender(name, model, more, AUTO, kv_bytes=pages[VANILLA] * page))
        for contender in here:
            contender.flops = flops
        result += here + ([Contender(name, model, lanes, STATIC)] if args.static else [])
    return result


def measure(args: argparse.Namespace) -> list[dict]:
    """One row for each contender."""
    models = {name: build(name, args) for name in (VANILLA, *args.models) if name in args.models or name == VANILLA}
    rows = []
    gc.freeze()  # as a server would: no pass over all modules within a step
    for lanes in args.lanes:
        contenders = contenders_of(lanes, models, args)
        begin = time.perf_counter()
        for number in range(args.rounds):
            spent = time.perf_counter() - begin
            if number and spent + spent / number > args.budget:
                print(f"{lanes} lanes: {number} of {args.rounds} rounds, for another may exceed --budget", flush=True)
                break
            works = requests(args.waves * lanes, number + 1, args)
            tokens = sum(len(work.new) for work in works)
            for contender in contenders:
                contender.seconds.append(contender.run(works, args) / tokens)
        rows += (new := [row(lanes, contender, contenders) for contender in contenders])
        print_table(new)
    return rows


def row(lanes: int, contender: Contender, all_of_them: list[Contender]) -> dict:
    """Medians; ratios are medians of the ratios within a round."""
    base = all_of_them[0]
    static = next((c for c in all_of_them if c.name == contender.name and c.turn_at == STATIC), None)
    best = min(
        (c for c in all_of_them if c.name == contender.name and isinstance(c.turn_at, int)),
        key=lambda c: statistics.median(c.seconds),
        default=None,
    )
    facts = contender.facts
    return {
        "base_lanes": lanes,
        "lanes": contender.lanes,
        "model": contender.name,
        "turn_at": contender.turn_at,
        "is_equal_memory": contender.kv_bytes is not None,
        "tokens_per_second": 1.0 / statistics.median(contender.seconds),
        "spread": (max(contender.seconds) - min(contender.seconds)) / statistics.median(contender.seconds),
        "over_vanilla": _ratio(base.seconds, contender.seconds),
        "over_static": None if static is None else _ratio(static.seconds, contender.seconds),
        "over_best_fixed": None if best is None else _ratio(best.seconds, contender.seconds),
        "bound": base.flops / contender.flops if facts else None,
        "pages_to_vanilla": facts["peak_pages"] / base.facts["peak_pages"] if facts else None,
        **facts,
    }


def _ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def print_table(rows: list[dict]) -> None:
    """A line for each contender."""
    print(
        f"{'model':15} {'lanes':>5} {'turn at':>8} {'tok/s':>7} {'spread':>6} {'/static':>7} {'/best':>6} "
        f"{'/vanilla':>8} {'bound':>5} {'of it':>5} {'FLOPs':>5} {'pages':>5} {'depth':>5} {'passes':>6} {'a turn':>6}"
    )
    for r in rows:
        line = f"{r['model']:15} {r['lanes']:5} {r['turn_at']:>8} {r['tokens_per_second']:7.1f} {r['spread']:6.0%}"
        line += _cell(r["over_static"], 8) + _cell(r["over_best_fixed"], 7) + _cell(r["over_vanilla"], 9)
        if r["bound"]:
            line += _cell(r["bound"], 6) + _cell(r["over_vanilla"] / r["bound"], 6) + _cell(1 / r["bound"], 6)
            line += _cell(r["pages_to_vanilla"], 6) + _cell(r["decoding_depth"], 6) + _cell(r["passes_per_token"], 7)
            line += _cell(r["sequences_per_turn"], 7)
        print(
            line + (f"  vanilla's memory, {r['preemptions']} preemptions" if r["is_equal_memory"] else ""), flush=True
        )
    for r in rows:
        if r["turn_at"] == AUTO and not r["is_equal_memory"]:
            costs = "; ".join(
                f"{k} {r[f'{k}_cost'][0] * 1e3:.2f} + {r[f'{k}_cost'][1] * 1e3:.2f} n" for k in ("pass", "turn")
            )
            print(f"{r['model']:15} {r['lanes']:5} ms for n rows: {costs}", flush=True)


def _cell(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.2f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="vanilla always runs")
    parser.add_argument("--lanes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--turn-at", nargs="*", type=int, help="beside automatic; default 1, B/4, B/2, B of B lanes")
    parser.add_argument("--waves", type=int, default=2, help="requests for each lane")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all rounds with so many lanes")
    parser.add_argument("--prompt", nargs=2, type=int, default=[64, 256], help="fewest and most tokens")
    parser.add_argument("--new", nargs=2, type=int, default=[32, 128], help="fewest and most tokens")
    parser.add_argument("--block", type=int, default=2, help="layers of the block; vanilla has as many unrolled layers")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave out `generate`")
    parser.add_argument("--no-equal-memory", dest="equal_memory", action="store_false", help="leave out equal memory")
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
