"""What each rank of a layout holds, sends and waits for, in our layouts and in DeepSpeed's tied pipeline.

    python benchmarks/parallel.py --json parallel.json

Starts its own processes (gloo, one thread each), new ones for every line of the tables.

- Held: weights, gradients and optimizer state in unique storages of the engine's tensors, and the peak of resident
  memory above that of a process that has only imported and connected. fp32, AdamW, the same global batch everywhere.
- Sent: bytes per iteration that a rank hands to torch.distributed; collectives by their ring algorithms.
- Idle: measured under a clock that pads each chunk to a constant time by sleeping (`schedule_clock.py`), because ranks
  that share cores cannot overlap their real work. Only these lines depend on how busy the machine is.
- Messages: what one rank sends the next in each recursion of an expert-choice model, in rows of hidden state.

The loss of the second iteration is printed for each layout, because all layouts run the same model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from parallel_jobs import CLOCK, FOOTPRINT, Layout, Settings, perform, run_ranks
from schedule_clock import Event, idle_shares, iterations, overruns

LAYOUTS = [
    Layout("1 process", zero=0),
    Layout("dp2 zero-0", dp=2, zero=0),
    Layout("dp2 zero-1", dp=2, zero=1),
    Layout("dp2 zero-2", dp=2, zero=2),
    Layout("dp2 zero-3", dp=2, zero=3),
    Layout("tp2", tp=2, zero=0),
    Layout("tp2-sp", tp=2, sequence_parallel=True, zero=0),
    Layout("pp2 ring", pp=2, zero=0),
    Layout("pp4 ring", pp=4, zero=0),
    Layout("tp2-pp2 ring", tp=2, pp=2, zero=0),
    Layout("pp2-dp2 ring zero-1", pp=2, dp=2, zero=1),
    Layout("pp2 tied stages", pp=2, zero=0, tied=True),
    Layout("pp4 tied stages", pp=4, zero=0, tied=True),
]
TIMED = [layout for layout in LAYOUTS if layout.pp > 1 and layout.tp == layout.dp == 1]
ROUTED_RING = Layout("pp4 ring, expert-choice", pp=4, zero=0, routing="expert_choice")
MIB = 2**20


@dataclass(frozen=True)
class Bubble:
    """Idle shares of one layout under the clock."""

    layout: str
    formula: float
    """(P-1) / (M*V + P-1)"""
    measured: dict[int, float]
    """By rank, the median over the iterations whose chunks all fitted into their set time, or over all if none did."""
    fitted: int
    """Number of iterations whose chunks all fitted."""
    iterations: int
    """Number of measured iterations."""


def measure_footprints(layouts: list[Layout], settings: Settings) -> list[dict]:
    """One row per layout, with lists by rank."""
    rows = []
    for layout in layouts:
        ranks = run_ranks(layout.world_size, perform, FOOTPRINT, layout, settings)
        row = {key: [rank[key] for rank in ranks] for key in ranks[0]}
        row["loss"] = row["loss"][0]
        rows.append({"layout": layout.name, **row})
        print(f"  measured {layout.name}", flush=True)
    return rows


def measure_bubble(layout: Layout, settings: Settings) -> tuple[Bubble, list[list[Event]]]:
    """Idle shares of a pipeline, and its events, one list per iteration."""
    runs = recorded_iterations(run_ranks(layout.world_size, perform, CLOCK, layout, settings))
    fitted = [run for run in runs if overruns(run, *settings.clock_seconds(layout)) == 0]
    shares = [idle_shares(run) for run in fitted or runs]
    chunks = 1 if layout.tied else settings.num_recursions
    formula = (layout.pp - 1) / (settings.clock_microbatches * chunks + layout.pp - 1)
    measured = {rank: statistics.median(share[rank] for share in shares) for rank in shares[0]}
    return Bubble(layout.name, formula, measured, len(fitted), len(runs)), fitted or runs


def recorded_iterations(reports: list[dict]) -> list[list[Event]]:
    """Events of all ranks, one list per iteration, without the first, which starts cold."""
    by_rank = [iterations([Event(**event) for event in report["events"]]) for report in reports]
    return [[event for events in same for event in events] for same in zip(*by_rank, strict=True)][1:]


def print_footprints(rows: list[dict]) -> None:
    """Bytes by rank, as Markdown."""
    one = rows[0]
    print("\n| layout | weights, MiB a rank | of these layers | of one process | gradients | optimizer "
          "| of one process | peak memory | loss |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            _mib(row["weights"]),
            _mib(row["layer_weights"]),
            _shares(row["layer_weights"], one["layer_weights"]),
            _mib(row["gradients"]),
            _mib(row["optimizer"]),
            _shares(row["optimizer"], one["optimizer"]),
            _mib(row["peak"], digits=0),
            f"{row['loss']:.6f}",
        ]
        print(f"| {row['layout']} | " + " | ".join(cells) + " |")
    print("\n| layout | sent in an iteration, MiB a rank |")
    print("|---|---|")
    for row in rows:
        # Counts, flags and losses of a few bytes are left out.
        purposes = sorted({purpose for sent in row["sent"] for purpose, size in sent.items() if size > 0.005 * MIB})
        cells = [f"{purpose} {_mib([sent.get(purpose, 0) for sent in row['sent']], digits=2)}" for purpose in purposes]
        print(f"| {row['layout']} | {'; '.join(cells) or 'nothing'} |")


def print_bubbles(bubbles: list[Bubble]) -> None:
    """Idle shares, as Markdown."""
    print("\n| pipeline | idle by formula | measured, by rank | largest / formula | iterations used |")
    print("|---|---|---|---|---|")
    for bubble in bubbles:
        ranks = " / ".join(f"{share:.1%}" for share in bubble.measured.values())
        ratio = max(bubble.measured.values()) / bubble.formula
        used = f"{bubble.fitted} of {bubble.iterations}"
        print(f"| {bubble.layout} | {bubble.formula:.1%} | {ranks} | {ratio:.2f} | {used} |")


def message_rows(run: list[Event], layout: Layout, settings: Settings) -> list[dict]:
    """Messages of one micro-batch of an expert-choice ring, in order."""
    sent = [event for event in run if event.microbatch == 0 and event.message is not None]
    tokens, rows = settings.clock_seq_length, []
    for event in sorted(sent, key=lambda event: (event.chunk, event.rank)):
        kept = settings.kept(event.chunk)
        rows.append(
            {
                "recursion": event.chunk,
                "sender": event.rank,
                "receiver": (event.rank + 1) % layout.pp,
                "tokens": tokens,
                "working_rows": kept,
                "rows": event.message[0],
                "limit": tokens + kept,
                # The mask of selected tokens and their gates also travel as rows, H numbers per row.
                "channels": -(-tokens // settings.clock_hidden_size) - (-kept // settings.clock_hidden_size),
            }
        )
    return rows


def print_messages(rows: list[dict]) -> None:
    """Rows per message, as Markdown."""
    print("\n| recursion | ranks | k_r | rows of the message | S + k_r | rows that mask and gate may add |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['recursion']} | {row['sender']} to {row['receiver']} | {row['working_rows']} | {row['rows']} "
              f"| {row['limit']} | {row['channels']} |")  # fmt: skip


def _mib(values: list[int], digits: int = 1) -> str:
    texts = [f"{value / MIB:.{digits}f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _shares(values: list[int], one: list[int]) -> str:
    texts = [f"{value / one[0]:.2f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[layout.name for layout in LAYOUTS], help="these layouts")
    parser.add_argument("--json", type=Path, help="JSON file for all measurements")
    parser.add_argument("--no-clock", action="store_true", help="skip idle shares and messages")
    parser.add_argument("--forward-ms", type=float, default=150.0, help="set time of a forward chunk of the ring")
    parser.add_argument("--backward-ms", type=float, default=300.0, help="set time of a backward chunk of the ring")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    settings = Settings(forward_ms=args.forward_ms, backward_ms=args.backward_ms)
    chosen = [layout for layout in LAYOUTS if not args.only or layout.name in args.only or layout.name == "1 process"]
    print(settings.describe(), flush=True)
    results = {"machine": settings.describe(), "footprints": measure_footprints(chosen, settings)}
    print_footprints(results["footprints"])
    if not args.no_clock:
        measured = [measure_bubble(layout, settings) for layout in TIMED if layout in chosen]
        bubbles = [bubble for bubble, _ in measured]
        print_bubbles(bubbles)
        results["bubbles"] = [asdict(bubble) for bubble in bubbles]
        results["traces"] = {bubble.layout: [asdict(event) for event in runs[-1]] for bubble, runs in measured}
        # Shapes do not depend on time.
        unpadded = replace(settings, forward_ms=0.0, backward_ms=0.0, clock_iterations=2)
        _, runs = measure_bubble(ROUTED_RING, unpadded)
        results["messages"] = message_rows(runs[-1], ROUTED_RING, settings)
        print_messages(results["messages"])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
