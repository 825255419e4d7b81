"""Self-speculation beside plain greedy decoding: is it worth guessing tokens from recursion 0?

A round drafts k tokens, one after the other, as if every token left the block after recursion 0. Then all of them pass
the deeper recursions that their routers want, and the last layers, together. The longest prefix of drafts that are what
the model itself would have said is kept, and one more token with it: the text is that of plain decoding, which is
checked. What recursion 0 and the layers before it computed for a draft stays valid, whatever its depth, so only the
deeper recursions and the last layers are computed for verification. Keys and values of what is rejected are taken back.

    OMP_NUM_THREADS=1 python benchmarks/speculate.py --model runs/mor --text corpus.jsonl --output speculate.json

Acceptance needs trained weights, and is that of the given model: the losses of its texts at depth 1 and at the routed
depth tell whether depth matters to it. `--spoil` replaces a part of the drafts by wrong ones, to see what a lower
acceptance would leave. Plain decoding (k = 0) runs in the same loop, without the engine's scheduler; the engine itself
stands beside it. All contenders take turns within a round, with other prompts in every round; medians are compared.
Prompts are processed in the measured time. Time is CPU time of the process unless `--clock wall` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from generate import CLOCKS
from processor import processor
from torch import Tensor

from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.inference.loading import encode, load_model
from mor_megatron.serving import Engine, EngineOptions, SamplingParams
from mor_megatron.serving.cohort import Rows
from mor_megatron.serving.runner import Entering, Runner


class Drafter(Runner):
    """A runner that can look at the model's answer after recursion 0."""

    def draft(self, rows: Entering) -> Tensor:
        """New rows pass recursion 0, and go on to recursion 1 if their routers want it.

        Returns:
            Logits as if none went on, [T, V].
        """
        self.enter(rows)
        cohort = self.cohorts[-1]
        passing = Rows([(cohort, cohort.active)])
        view, order = self._block_view(passing)
        x = self._layers(self.plan.pass_layers(0), passing.gather([cohort.stream.rows], order), view)
        hidden = self.method.merged(replace(cohort.stream, rows=x)).hidden
        if (live := cohort.close(x)) is not None:
            cohort.settle(live.numpy())
        every = np.arange(len(rows.ids))
        return self._logits([hidden], [every], Rows([(cohort, every)]), every)


@dataclass
class Decoded:
    """Greedy continuations, and what happened to the drafts."""

    tokens: list[list[int]]
    rounds: int = 0
    """Of all sequences."""
    drafted: Counter[int] = field(default_factory=Counter)
    """By the depth of the token that the draft followed; drafts after a rejected one are not counted."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Likewise."""


@torch.inference_mode()
def decode(model: MoRForCausalLM, prompts: list[list[int]], new: int, drafts: int, spoil: float = 0.0) -> Decoded:
    """Continue prompts, all in step.

    Args:
        new: tokens for each.
        drafts: k; 0: plain decoding.
        spoil: probability that another token stands for a draft.
    """
    longest = max(map(len, prompts)) + new + drafts
    engine = Engine(model, None, EngineOptions(lanes=len(prompts), max_length=longest, prefix_cache=False))
    store = engine.store
    runner = Drafter(engine.runner.model, store, longest, engine.runner.kernel)
    for slot in range(len(prompts)):
        for table in store.tables(slot):
            table.pages.grow(table.index, table.pages.needed(longest))
    options = (model.config.depth, model.config.router_threshold)
    chance = random.Random(str(prompts))

    def entering(parts: dict[int, tuple[int, list[int]]]) -> Entering:
        """By slot: position of the first of some tokens, and the tokens."""
        rows = [(slot, begin + i, token) for slot, (begin, ids) in parts.items() for i, token in enumerate(ids)]
        return Entering(*map(list, zip(*rows, strict=True)), [options] * len(rows))

    def pass_block() -> None:
        while runner.is_open:
            runner.advance()

    slots = list(range(len(prompts)))
    runner.enter(entering({slot: (0, prompts[slot]) for slot in slots}))
    pass_block()
    first = runner.leave(slots, dict.fromkeys(slots, 1)).logits.argmax(1).tolist()
    texts = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)]
    result = Decoded([])
    while slots := [slot for slot in slots if len(texts[slot]) < len(prompts[slot]) + new]:
        guesses: dict[int, list[int]] = {slot: texts[slot][-1:] for slot in slots}
        for k in range(drafts + 1):
            rows = entering({slot: (len(texts[slot]) - 1 + k, guess[-1:]) for slot, guess in guesses.items()})
            if k < drafts:
                for slot, token in zip(slots, runner.draft(rows).argmax(1).tolist(), strict=True):
                    is_spoiled = chance.random() < spoil
                    guesses[slot].append((token + 1) % model.config.vocab_size if is_spoiled else token)
            else:
                runner.enter(rows)
        pass_block()
        left = runner.leave(slots, dict.fromkeys(slots, drafts + 1))
        for slot, best in zip(slots, left.logits.argmax(1).view(len(slots), -1).tolist(), strict=True):
            kept, depths = 0, left.depths[slot]
            for guess, token, depth in zip(guesses[slot][1:], best, depths, strict=False):
                result.drafted[depth] += 1
                if guess != token:
                    break
                result.accepted[depth] += 1
                kept += 1
            texts[slot] += best[: kept + 1]
            for table in store.tables(slot):
                table.pages.rows[table.index] -= sum(depth > table.recursion for depth in depths[kept + 1 :])
        result.rounds += len(slots)
    result.tokens = [text[len(prompt) :][:new] for prompt, text in zip(prompts, texts, strict=True)]
    return result


def decode_by_engine(model: MoRForCausalLM, prompts: list[list[int]], new: int, turn_at: int) -> Decoded:
    """Continue prompts by the engine as it is."""
    engine = Engine(model, None, EngineOptions(lanes=len(prompts), turn_at=turn_at, prefix_cache=False))
    requests = [engine.add(prompt, SamplingParams(max_tokens=new, ignore_eos=True)) for prompt in prompts]
    engine.drain()
    return Decoded([request.generated for request in requests], len(prompts) * (new - 1))


@dataclass(frozen=True)
class Contender:
    """A way to decode."""

    drafts: int = 0
    """k; 0: plain."""
    spoil: float = 0.0
    turn_at: int | None = None
    """Of the engine; None: in step, without it."""

    def __str__(self) -> str:
        if self.turn_at is not None:
            return f"engine, turn at {self.turn_at}"
        return f"k = {self.drafts}" + (f", {self.spoil:.0%} spoiled" if self.spoil else "")

    def run(self, model: MoRForCausalLM, prompts: list[list[int]], new: int) -> Decoded:
        """Continue prompts."""
        if self.turn_at is None:
            return decode(model, prompts, new, self.drafts, self.spoil)
        return decode_by_engine(model, prompts, new, self.turn_at)


PLAIN = Contender()


@torch.inference_mode()
def describe(model: MoRForCausalLM, texts: list[list[int]]) -> dict[str, float]:
    """Of texts: losses, and where both depths name the same next token."""
    ids = torch.tensor(texts)
    shallow, routed = model(ids, labels=ids, depth=1), model(ids, labels=ids)
    return {
        "loss_at_depth_1": shallow.loss.item(),
        "loss_at_routed_depth": routed.loss.item(),
        "same_token": (shallow.logits.argmax(-1) == routed.logits.argmax(-1)).float().mean().item(),
        "mean_depth": routed.depths.float().mean().item(),
    }


def read_texts(path: Path, tokenizer, vocabulary: int, length: int) -> list[list[int]]:
    """Pieces of `length` tokens, one of each document that is long enough."""
    documents = (json.loads(line)["text"] for line in path.open(encoding="utf-8"))
    encoded = (encode(text[: 20 * length], tokenizer, vocabulary) for text in documents)
    return [ids[:length] for ids in encoded if len(ids) >= length]


def measure(args: argparse.Namespace) -> dict:
    """Facts of the model, and one row for each number of lanes and contender."""
    model, tokenizer = load_model(args.model, device="cpu")
    texts = read_texts(args.text, tokenizer, model.config.vocab_size, args.prompt + args.new)
    random.Random(0).shuffle(texts)
    facts = describe(model, texts[:32])
    print(", ".join(f"{name} {value:.3f}" for name, value in facts.items()), flush=True)
    contenders, rows = [PLAIN, *(Contender(k, spoil) for k in args.drafts for spoil in args.spoil)], []
    for lanes in args.lanes:
        engines = [Contender(turn_at=n) for n in sorted({1, max(1, lanes // 2), lanes})]
        rows += (new := measure_lanes(lanes, [*engines, *contenders], model, texts, args))
        for r in new:
            print(line_of(r), flush=True)
    return {"model": facts, "rows": rows}


def measure_lanes(
    lanes: int, contenders: list[Contender], model: MoRForCausalLM, texts: list[list[int]], args: argparse.Namespace
) -> list[dict]:
    """One row for each contender."""
    seconds, sums = {c: [] for c in contenders}, {c: Decoded([]) for c in contenders}
    for number in range(-1, args.rounds):  # the first one warms up
        prompts = [text[: args.prompt] for text in random.Random(number).sample(texts, lanes)]
        found = {}
        for contender in contenders:
            start = CLOCKS[args.clock]()
            done = contender.run(model, prompts, args.new)
            if number >= 0:
                seconds[contender].append((CLOCKS[args.clock]() - start) / (lanes * args.new))
                sums[contender].rounds += done.rounds
                sums[contender].drafted += done.drafted
                sums[contender].accepted += done.accepted
            found[contender] = done.tokens
        wrong = [str(contender) for contender in contenders if found[contender] != found[PLAIN]]
        assert not wrong, f"other tokens than plain decoding: {wrong}"
    return [row(c, lanes, seconds, sums[c], args) for c in contenders]


def row(contender: Contender, lanes: int, seconds: dict, done: Decoded, args: argparse.Namespace) -> dict:
    """Medians; ratios are medians of the ratios within a round."""
    own, plain = seconds[contender], seconds[PLAIN]
    return {
        "lanes": lanes,
        "contender": str(contender),
        "tokens_per_second": 1.0 / statistics.median(own),
        "spread": (max(own) - min(own)) / statistics.median(own),
        "over_plain": statistics.median(a / b for a, b in zip(plain, own, strict=True)),
        "tokens_per_round": args.rounds * lanes * (args.new - 1) / done.rounds,
        "acceptance": done.accepted.total() / done.drafted.total() if done.drafted else None,
        "acceptance_by_depth": {d: done.accepted[d] / n for d, n in sorted(done.drafted.items())},
        "drafts_by_depth": dict(sorted(done.drafted.items())),
    }


def line_of(r: dict) -> str:
    """A line of the table."""
    text = f"{r['lanes']:3} lanes {r['contender']:19} {r['tokens_per_second']:7.1f} tok/s ({r['spread']:.0%}) "
    text += f"{r['over_plain']:5.2f} of plain, {r['tokens_per_round']:.2f} tokens a round"
    if r["acceptance"] is not None:
        depths = ", ".join(f"{d}: {x:.1%}" for d, x in r["acceptance_by_depth"].items())
        text += f", {r['acceptance']:.1%} of drafts accepted (by depth {depths})"
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="export or checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with a field `text`")
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--drafts", nargs="+", type=int, default=[1, 2, 4], help="tokens drafted in a round")
    parser.add_argument("--spoil", nargs="+", type=float, default=[0.0, 0.1, 0.2], help="fractions of wrong drafts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    machine = (
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}; {args.model}, prompts of "
        f"{args.prompt}, {args.new} new; {args.rounds} interleaved rounds, medians of {args.clock} time"
    )
    print(machine, flush=True)
    found = measure(args)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, **found}, indent=1))


if __name__ == "__main__":
    main()
