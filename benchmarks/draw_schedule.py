"""Draw the results of `parallel.py`: which rank ran which micro-batch when, and what it sent.

    python benchmarks/parallel.py --json parallel.json
    python benchmarks/draw_schedule.py parallel.json --output docs/figures

`schedule.png`: the ring and the pipeline of tied stages, four ranks, one iteration each, on one time axis. A box is a
chunk of a micro-batch at its measured time; nothing is placed by formula. `messages.png`: the rows of each message of a
micro-batch on its way round the ring, and the bytes that a rank sends in an iteration.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from schedule_clock import FORWARD, Event, idle_shares

RING, TIED = "pp4 ring", "pp4 tied stages"
FORWARD_COLORS = ("#c6dbef", "#6baed6", "#2171b5")
BACKWARD_COLORS = ("#fdd0a2", "#fd8d3c", "#d94801")
PURPOSE_COLORS = {"p2p": "#6baed6", "embedding": "#9e9ac8", "tied gradients": "#d94801"}


def draw_run(axes: Axes, events: list[Event], title: str) -> None:
    """Draw the boxes of one iteration, one line per rank, starting at its first chunk."""
    begin = min(event.start for event in events)
    for event in events:
        colors = FORWARD_COLORS if event.kind == FORWARD else BACKWARD_COLORS
        color = colors[event.chunk % len(colors)]
        width = event.end - event.start
        axes.barh(
            event.rank, width, left=event.start - begin, height=0.86, color=color, edgecolor="white", linewidth=0.6
        )
        dark = event.chunk % len(colors) == len(colors) - 1
        axes.text(
            event.start - begin + width / 2,
            event.rank,
            str(event.microbatch),
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else "black",
        )
    idle = idle_shares(events)
    span = max(event.end for event in events) - begin
    axes.set_title(
        f"{title}: {span:.2f} s, of which a rank waits {sum(idle.values()) / len(idle):.0%}", fontsize=9, loc="left"
    )
    axes.set_yticks(sorted(idle), [f"rank {rank}" for rank in sorted(idle)], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.005)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_facecolor("#f2f2f2")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_schedule(traces: dict[str, list[Event]], path: Path) -> None:
    """Ring above, tied stages below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 4.4), sharex=True, layout="constrained")
    draw_run(above, traces[RING], "ring: a turn is a recursion, each rank holds a quarter of the block")
    draw_run(below, traces[TIED], "stages with tied copies (DeepSpeed TiedLayerSpec), the same work")
    below.set_xlabel("seconds; numbers are micro-batches", fontsize=8)
    turns = range(len({event.chunk for event in traces[RING]}))
    keys = [Patch(color=FORWARD_COLORS[r], label=f"forward, recursion {r}") for r in turns]
    keys += [Patch(color=BACKWARD_COLORS[r], label=f"backward, recursion {r}") for r in turns]
    keys += [Patch(color="#f2f2f2", label="waiting")]
    figure.legend(handles=keys, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_messages(messages: list[dict], footprints: list[dict], path: Path) -> None:
    """Draw the rows per message of the expert-choice ring, and the bytes sent by rank and purpose."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.2), width_ratios=(3, 2), layout="constrained")
    for hop, message in enumerate(messages):
        left.bar(hop, message["rows"], color=FORWARD_COLORS[message["recursion"] % len(FORWARD_COLORS)], width=0.8)
        left.hlines(message["limit"], hop - 0.45, hop + 0.45, color="black", linewidth=1.2)
        left.text(hop, message["rows"], str(message["rows"]), ha="center", va="bottom", fontsize=7)
    left.set_xticks(
        range(len(messages)), [f"{m['sender']}→{m['receiver']}\nr={m['recursion']}" for m in messages], fontsize=7
    )
    left.set_ylabel("rows of hidden state", fontsize=8)
    left.set_title(
        f"one micro-batch of {messages[0]['tokens']} tokens on its way round, expert-choice; "
        "line: S + k_r, to which mask and gate add",
        fontsize=9,
        loc="left",
    )
    chosen = [row for row in footprints if row["layout"] in (RING, TIED)]
    bars = [(row["layout"], rank, sent) for row in chosen for rank, sent in enumerate(row["sent"])]
    for x, (_, _, sent) in enumerate(bars):
        bottom = 0.0
        for purpose, color in PURPOSE_COLORS.items():
            height = sent.get(purpose, 0) / 2**20
            right.bar(x, height, bottom=bottom, color=color, width=0.8)
            bottom += height
    right.set_xticks(range(len(bars)), [f"{rank}" for _, rank, _ in bars], fontsize=7)
    right.set_xlabel("   |   ".join(f"ranks of {row['layout']}" for row in chosen), fontsize=8)
    right.set_ylabel("MiB sent in an iteration", fontsize=8)
    right.legend(handles=[Patch(color=c, label=p) for p, c in PURPOSE_COLORS.items()], fontsize=7, frameon=False)
    right.set_title("recursive model without routing", fontsize=9, loc="left")
    for axes in (left, right):
        axes.tick_params(axis="y", labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Draw both figures from a file of `parallel.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="written by benchmarks/parallel.py --json")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    args = parser.parse_args(argv)
    results = json.loads(args.results.read_text())
    missing = {RING, TIED} - results.get("traces", {}).keys()
    if missing:
        parser.error(f"{args.results} has no trace of {', '.join(sorted(missing))}: run parallel.py without --no-clock")
    args.output.mkdir(parents=True, exist_ok=True)
    traces = {name: [Event(**event) for event in results["traces"][name]] for name in (RING, TIED)}
    draw_schedule(traces, args.output / "schedule.png")
    draw_messages(results["messages"], results["footprints"], args.output / "messages.png")


if __name__ == "__main__":
    main()
