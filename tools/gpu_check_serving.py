"""The stage of `gpu_check.py` about the serving engine: equal to `generate`, waits, and speed."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.batch import generate_all
from mor_megatron.serving import Engine, EngineOptions, SamplingParams, engine, runner
from mor_megatron.serving.attention import DeviceReads
from mor_megatron.serving.graphs import build_lanes
from mor_megatron.serving.kernel import PLAIN, choose
from mor_megatron.serving.pages import Pages
from mor_megatron.serving.transfer import fetch, send

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
    cases = [("tiny", kind) for kind in KINDS] + [("135M", "expert-choice"), ("135M", "token-choice")]
    for shape, kind in cases[:3] if run.small else cases:
        std = 0.2 if shape == "tiny" else 0.06
        settings = {"tie_word_embeddings": False, "initializer_range": std}
        model = model_of(shape, KINDS[kind], run.device, **settings)
        random = torch.Generator().manual_seed(1)
        lengths = (3, 40, 1, 17, 9, 25, 60, 5)
        prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=random).tolist() for n in lengths]
        expected = list(generate_all(model, prompts, len(prompts), 16))
        for eager in (True,) if run.small else (False, True) if kind == "expert-choice" else (False,):
            own = engine_of(model, 5, turn_at=2, chunk=32, enforce_eager=eager)
            params = SamplingParams(max_tokens=16, ignore_eos=True, last_depth=True)
            requests = [own.add(prompt, params) for prompt in prompts]
            own.drain()
            tokens = sum(list(done.tokens) != r.generated for done, r in zip(expected, requests, strict=True))
            depths = sum(
                list(done.depths) != r.depths[len(r.prompt) :] for done, r in zip(expected, requests, strict=True)
            )
            pages = sum(pages.used for pages in own.store.kinds)
            row = {"what": "engine and generate", "model": f"{shape} {kind}", "launched": launched(own)}
            row |= {
                "sequences that differ": tokens,
                "in depth": depths,
                "different tokens": len({*requests[0].generated}),
            }
            yield row | {"failed": bool(tokens or depths or pages)}
        del own, model
        release()


def launched(own: Engine) -> str:
    """How kernels are launched."""
    lanes = own.runner.lanes
    return "as rows" if lanes is None else "CUDA graphs" if lanes.is_captured else "eagerly"


def waits(run: Run) -> Iterator[Row]:
    """How often steps wait for the device: one that is a pass only, and one that is a turn as well."""
    from gpu_check_speed import waits_of

    for kind in ("vanilla", "expert-choice", "token-choice, KV sharing"):
        own = engine_of(model_of("tiny", KINDS[kind], run.device), 4, turn_at=3)
        for n in (3, 9, 5, 7):
            own.add(list(range(n)), SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(12):
            own.step()
        most: Counter[str] = Counter()
        sites = ""
        for _ in range(12):
            before, asked = own.runner.turns, mock.Mock(side_effect=fetch)
            with mock.patch.object(runner, "fetch", asked):  # PyTorch's check does not see that it waits
                found = waits_of(own.step)
            found["waits"] += asked.call_count
            name = "turn and pass" if own.runner.turns > before else "pass"
            if found["waits"] > most[name] or not sites:
                sites = found["sites"]
            most[name] = max(most[name], found["waits"])
        row = {"what": "waits of a step", "model": kind, "launched": launched(own)}
        yield row | {f"waits, {name}": count for name, count in most.items()} | {"sites": sites}


def speed(run: Run) -> Iterator[Row]:
    """Tokens/s of decoding at 360M, bf16, forced tokens: vanilla, and expert-choice with 2, 3 and 4 recursions."""
    shape, dtype = ("tiny", torch.float32) if run.small else ("360M", torch.bfloat16)
    base: dict[str, float] = {}
    for recursions in (1, 3) if run.small else (1, 3, 2, 4):
        kind = {} if recursions == 1 else {"num_recursions": recursions, "routing": "expert_choice"}
        if recursions == 4:
            kind["num_hidden_layers"] = 34  # as the paper's: 32 does not divide
        model = model_of(shape, kind, run.device)
        if recursions > 1:
            keep_capacities(model)
        cast(model, dtype)
        fractions = model.model.router.planned_fractions()
        layers = model.config.num_hidden_layers
        rows = 2 + (layers - 2) / recursions * sum(fractions)  # layers that hold a token, on average
        lanes = 4 if run.small else LANES
        cases = [(lanes, False)]
        if recursions > 1:
            cases += [(int(lanes * SHAPES[shape]["num_hidden_layers"] / rows), False)]
        cases += [(lanes, True)]
        for count, eager in cases:
            if run.left() < 5.0 and not run.small:
                yield {"what": "decoding", "model": f"Nr={recursions}", "skipped": f"{run.left():.0f} s left"}
                continue
            start = time.perf_counter()
            own = engine_of(model, count, enforce_eager=eager)
            own_start = time.perf_counter() - start
            if not eager and count == lanes:
                yield from costs(run, own, f"{shape} Nr={recursions}")
            turns = (count // 2,) if recursions == 1 else (1, count // 4, count // 2, count)
            for turn_at in turns if not eager else turns[:: max(1, len(turns) - 1)]:
                own.turn_at = turn_at
                row = decode(run, own)
                mode = launched(own)
                base.setdefault(mode, row["tokens/s"])
                name = {"what": "decoding", "model": f"{shape} Nr={recursions}", "lanes": count, "turn_at": turn_at}
                row = {**name, "launched": mode, **row, "over vanilla": row["tokens/s"] / base[mode]}
                yield row | {
                    "planned KV / vanilla's": count * rows / (lanes * SHAPES[shape]["num_hidden_layers"]),
                    "start, s": own_start,
                }
            del own
            release()
        del model
        release()


def keep_capacities(model: MoRForCausalLM) -> None:
    """Shift the routers until each recursion keeps its capacity of random tokens."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from generate import shift_routers

    with torch.no_grad():
        device = model.device
        sample = torch.randint(0, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(1)).to(
            device
        )
        shift_routers(model, sample)


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

    rounds, rates, steps = (4, [], 0) if run.small else (64, [], 0)
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


def costs(run: Run, own: Engine, model: str) -> Iterator[Row]:
    """Time of the device for a pass of the block and for what stands around it, by rows: a + b n."""
    lanes = own.runner.lanes
    for name in ("block", "turn", "enter"):
        times = {size: device_ms(lanes.functions[name, size][1]) for size in (lanes.sizes[0], lanes.sizes[-1])}
        (small, few), (large, many) = times.items()
        slope = (many - few) / max(1, large - small)
        yield (
            {"what": f"device time, {name}", "model": model, "launched": launched(own)}
            | {f"ms, {size} rows": value for size, value in times.items()}
            | {"a, ms": few - slope * small, "b, us": 1e3 * slope}
        )


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
