"""The stage of `gpu_check.py` about the serving engine: equal to `generate`, waits, and speed."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.batch import generate_all
from mor_megatron.serving import Engine, EngineOptions, SamplingParams, engine
from mor_megatron.serving.attention import DeviceReads
from mor_megatron.serving.graphs import build_lanes
from mor_megatron.serving.kernel import PLAIN, choose
from mor_megatron.serving.pages import Pages
from mor_megatron.serving.transfer import send

if TYPE_CHECKING:
    from gpu_check import Row, Run

ROOT = Path(__file__).parents[1]
_EXPERT = {"num_recursions": 3, "routing": "expert_choice"}
_TOKEN = {"num_recursions": 3, "routing": "token_choice", "router_balance": "loss_free"}
KINDS = {
    "vanilla": {},
    "recursive": {"num_recursions": 3},
    "expert-choice": _EXPERT,
    "expert-choice, KV sharing": {**_EXPERT, "kv_mode": "sharing"},
    "token-choice": _TOKEN,
    "token-choice, KV sharing": {**_TOKEN, "kv_mode": "sharing"},
}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY |= {"vocab_size": 512, "num_hidden_layers": 8}
SHAPES = {
    "tiny": TINY,
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"vocab_size": 49152, "num_hidden_layers": 32},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
    | {"vocab_size": 49152, "num_hidden_layers": 32},
}
LANES, PROMPT, LONGEST = 32, 16, 512


def model_of(shape: str, kind: dict, device: str, **settings) -> MoRForCausalLM:
    """Random weights in fp32, drawn on the device."""
    torch.manual_seed(3)
    with torch.device(device):
        return MoRForCausalLM(
            MoRConfig(**{**SHAPES[shape], "max_position_embeddings": LONGEST, **kind, **settings})
        ).eval()


def cast(model: MoRForCausalLM, dtype: torch.dtype) -> None:
    """All weights but those of routers, in place."""
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)


def engine_of(model: MoRForCausalLM, lanes: int, **options) -> Engine:
    """On a CPU, too, sequences decode in lanes."""
    own = Engine(model, None, EngineOptions(lanes=lanes, max_length=LONGEST, prefix_cache=False, **options))
    if own.runner.lanes is None:
        own.runner.lanes = build_lanes(model, own.store, own.runner.rotation, lanes, PLAIN, enforce_eager=True)
    return own


def serving(run: Run) -> Iterator[Row]:
    """All of it, what must be right first."""
    yield from kernel(run)
    yield from equality(run)
    yield from waits(run)
    yield from speed(run)


def kernel(run: Run) -> Iterator[Row]:
    """Attention over pages against padded copies in fp64."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for what, lengths, parts in (
            ("32 queries", [9 * i + 1 for i in range(32)], 0),
            ("one", [400], 0),
            ("a part", [300], 70),
        ):
            generator = torch.Generator().manual_seed(0)
            pages = Pages({0}, len(lengths), LONGEST, 800, 16, torch.empty(5, 64))
            for table, rows in enumerate(lengths):
                pages.grow(table, pages.needed(rows))
            table = np.repeat(np.arange(len(lengths)), parts or 1)
            seen = np.concatenate([np.arange(n - (parts or 1), n) + 1 for n in lengths])
            buffers = [torch.randn(801 * 16, 5, 64, generator=generator).to(run.device, dtype) for _ in range(2)]
            query = torch.randn(len(table), 15, 64, generator=generator).to(run.device, dtype)
            attend = choose("native", dtype, torch.device(run.device)) if not run.small else PLAIN
            reads = DeviceReads(pages, table, seen, attend, 3)
            reads.receive(send(reads.arrays, torch.device(run.device)))
            found = reads.attend(query, *buffers)
            reads.kernels = PLAIN
            exact = reads.attend(*(x.double() for x in (query, *buffers)))
            error = (found - exact).abs().max().item()
            limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            yield {"what": f"kernel, {what}", "type": str(dtype)[6:], "error": error, "failed": not error < limit}


def equality(run: Run) -> Iterator[Row]:
    """Greedy tokens and depths of the engine, in fp32, against `generate` on the same device."""
    cases = [("tiny", kind, False) for kind in KINDS]
    cases += [("135M", "expert-choice", False), ("135M", "token-choice", False), ("tiny", "expert-choice", True)]
    for shape, kind, eager in cases[:3] if run.small else cases:
        std = 0.2 if shape == "tiny" else 0.06
        model = model_of(shape, KINDS[kind], run.device, tie_word_embeddings=False, initializer_range=std)
        random = torch.Generator().manual_seed(1)
        lengths = (3, 40, 1, 17, 9, 25)
        prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=random).tolist() for n in lengths]
        expected = list(generate_all(model, prompts, len(prompts), 12))
        own = engine_of(model, 4, turn_at=2, chunk=32, enforce_eager=eager)
        params = SamplingParams(max_tokens=12, ignore_eos=True, last_depth=True)
        requests = [own.add(prompt, params) for prompt in prompts]
        own.drain()
        pairs = list(zip(expected, requests, strict=True))
        tokens = sum(list(done.tokens) != request.generated for done, request in pairs)
        depths = sum(list(done.depths) != request.depths[len(request.prompt) :] for done, request in pairs)
        row = {"what": "engine and generate", "model": f"{shape} {kind}", "launched": launched(own)}
        row |= {"sequences that differ": tokens, "in depth": depths, "different tokens": len({*requests[0].generated})}
        yield row | {"failed": bool(tokens or depths or any(pages.used for pages in own.store.kinds))}
        del own, model
        release()


def launched(own: Engine) -> str:
    """How kernels are launched."""
    lanes = own.runner.lanes
    return "as rows" if lanes is None else "CUDA graphs" if lanes.is_captured else "eagerly"


def waits(run: Run) -> Iterator[Row]:
    """How often steps wait for the device: those that are a pass only, and those that are a turn as well."""
    from gpu_check_speed import waits_of

    for kind in ("vanilla", "expert-choice", "token-choice, KV sharing"):
        own = engine_of(model_of("tiny", KINDS[kind], run.device), 4, turn_at=3)
        for n in (3, 9, 5, 7):
            own.add(list(range(n)), SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(12):
            own.step()
        most: Counter[str] = Counter()
        sites: set[str] = set()
        for _ in range(12):
            before = own.runner.turns
            found = [site for site in waits_of(own.step)["sites"].split("; ") if site and "cuda/__init__" not in site]
            name = "waits, turn and pass" if own.runner.turns > before else "waits, pass"
            most[name] = max(most[name], sum(int(site.split()[0]) for site in found))
            sites.update(found)
        row = {"what": "waits of a step", "model": kind, "launched": launched(own)} | dict(most)
        failed = most["waits, pass"] > 1 or most["waits, turn and pass"] > 2
        yield row | {"sites": "; ".join(sorted(sites)), "failed": failed}


def speed(run: Run) -> Iterator[Row]:
    """Tokens/s of decoding at 360M, bf16, forced tokens: vanilla, and expert-choice with 2, 3 and 4 recursions.

    At equal lanes, and with as many lanes as need vanilla's memory for keys and values.
    """
    shape, dtype = ("tiny", torch.float32) if run.small else ("360M", torch.bfloat16)
    lanes, layers = (4, 8) if run.small else (LANES, 32)
    models, more, base = {}, {}, {}
    for recursions in (1, 3) if run.small else (1, 2, 3, 4):
        kind = {} if recursions == 1 else {"num_recursions": recursions, "routing": "expert_choice"}
        if recursions == 4:
            kind["num_hidden_layers"] = 34  # as the paper's: 32 does not divide
        models[recursions] = model = model_of(shape, kind, run.device)
        keep_capacities(model)
        cast(model, dtype)
        fractions = sum(model.model.router.planned_fractions())
        rows = 2 + (model.config.num_hidden_layers - 2) / recursions * fractions  # layers that hold a token, on average
        more[recursions] = int(lanes * layers / rows)
    first = [(1, lanes, lanes, False)]
    first += [(r, n, turn_at, False) for r in models if r > 1 for n in (lanes, more[r]) for turn_at in (n, None)]
    rest = [(3, n, turn_at, False) for n in (lanes, more[3]) for turn_at in (1, n // 4, n // 2)]
    rest += [(1, lanes, lanes, True), (3, lanes, lanes, True), (3, lanes, None, True), (3, more[3], None, True)]
    for recursions, count, turn_at, eager in first + (rest[:1] if run.small else rest):
        name: Row = {
            "what": "decoding",
            "model": f"{shape} Nr={recursions}",
            "lanes": count,
            "turn_at": turn_at or "default",
        }
        if run.left() < 2.0 and not run.small:
            yield name | {"skipped": f"{run.left():.0f} s left"}
            continue
        own = engine_of(models[recursions], count, enforce_eager=eager, turn_at=turn_at)
        times = costs(own)
        if (turn_at, eager) == (count, False):
            what = {"what": "device time", "model": name["model"], "lanes": count, "launched": launched(own)}
            yield what | times | (kernels_of(own, count) if count == lanes else {})
        row = decode(run, own)
        row["ms/round"] = 1e3 * count / row["tokens/s"]
        row["of it device"] = row["passes/round"] * times["block, ms"] + row["turns/round"] * (
            times["turn, ms"] + times["enter, ms"]
        )
        row["over vanilla"] = row["tokens/s"] / base.setdefault(eager, row["tokens/s"])
        yield name | {"launched": launched(own)} | row
        del own
        release()


def keep_capacities(model: MoRForCausalLM) -> None:
    """Set the routers so that each recursion keeps its capacity of random tokens, in any precision.

    No layer changes two channels of the residual stream: the first is 1, the second a random number of the token. A
    router compares the two. A gate scales both.
    """
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 1.0
        embedding[:, 1].uniform_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0.0
            layer.mlp.down_proj.weight[:2] = 0.0
        for router, capacity in zip(model.model.router.threshold_routers, model.model.plan.capacities, strict=False):
            router.out.weight.zero_()
            router.out.weight[0, 0], router.out.weight[0, 1] = capacity - 1.0, 1.0


def decode(run: Run, own: Engine) -> Row:
    """All lanes decode, prompts are in, and the next tokens are given; each round computes them all the same."""
    count, generated = own.options.lanes, Counter()
    random = np.random.default_rng(0)
    given = random.integers(0, own.model.config.vocab_size, (count * 4, LONGEST)).tolist()
    new = LONGEST - PROMPT
    compute = engine.sample

    def force(logits: Tensor, requests: list, ends: set[int]) -> list[int]:
        compute(logits, requests, ends)
        return [given[int(r.id) % len(given)][len(r.tokens)] for r in requests]

    def hear(event) -> None:
        generated["tokens"] += 1

    rounds, rates, steps = (3, [], 0) if run.small else (48, [], 0)
    with mock.patch.object(engine, "sample", force):
        requests = [
            own.add(given[i][:PROMPT], SamplingParams(max_tokens=new, ignore_eos=True), hear) for i in range(count)
        ]
        while min(len(r.generated) for r in requests) < 2:
            own.step()
        passes, turns, first = own.runner.passes, own.runner.turns, generated["tokens"]
        for _ in range(3):
            wait()
            before, start = generated["tokens"], time.perf_counter()
            while generated["tokens"] - before < rounds * count:
                own.step()
                steps += 1
            wait()
            rates.append((generated["tokens"] - before) / (time.perf_counter() - start))
        passes, turns, tokens = own.runner.passes - passes, own.runner.turns - turns, generated["tokens"] - first
        depths = [depth for r in requests for depth in r.depths[PROMPT:]]
        for request in requests:
            own.cancel(request)
        own.drain()
    return {
        "tokens/s": statistics.median(rates),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "ms/step": 1e3 * tokens / statistics.median(rates) / steps,
        "mean depth": statistics.mean(depths),
        "passes/round": passes * count / tokens,
        "turns/round": turns * count / tokens,
    }


def costs(own: Engine) -> Row:
    """Time of the device for a pass of the block, and for what stands around it; the cost model's a + b n of a pass."""
    lanes = own.runner.lanes
    few, many = lanes.sizes[0], lanes.sizes[-1]
    times = {name: device_ms(lanes.functions[name, many][1]) for name in ("block", "turn", "enter")}
    small = device_ms(lanes.functions["block", few][1])
    row: Row = {f"{name}, ms": value for name, value in times.items()}
    return row | {"block of 1 row, ms": small, "b, us": 1e3 * (times["block"] - small) / max(1, many - few)}


@torch.inference_mode()
def kernels_of(own: Engine, size: int) -> Row:
    """Kernels of a pass of the block, and the sum of their times."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        own.runner.lanes.functions["block", size][1]()
        wait()
    events = profiler.key_averages()
    spent = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    top = sorted(spent.items(), key=lambda pair: -pair[1])[:12]
    return {
        "kernels of block": sum(event.count for event in events),
        "their ms": sum(spent.values()) / 1e3,
        "top kernels": [(name[:100], round(us, 1)) for name, us in top],
    }


@torch.inference_mode()
def device_ms(function, rounds: int = 20) -> float:
    """Of one call, back to back with others."""
    function()
    wait()
    start = time.perf_counter()
    for _ in range(rounds):
        function()
    wait()
    return 1e3 * (time.perf_counter() - start) / rounds


def wait() -> None:
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
