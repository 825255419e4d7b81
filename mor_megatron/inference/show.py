"""Display of token depths: coloured text in a terminal, an HTML page, a heat map, means by kind of token."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

Shown = tuple[str, int]
"""Text of a token, and the number of recursions that it took."""

_TERMINAL = (34, 36, 32, 33, 31, 35)
"""Colours from shallow to deep, as ANSI codes."""


def terminal(piece: str, depth: int, num_recursions: int) -> str:
    """A text in the terminal colour of its depth."""
    return f"\x1b[{_TERMINAL[_step(depth, num_recursions, len(_TERMINAL))]}m{piece}\x1b[0m"


def legend(num_recursions: int) -> str:
    """The colours of all depths, for a terminal."""
    return "depth " + " ".join(terminal(str(depth), depth, num_recursions) for depth in range(1, num_recursions + 1))


def page(tokens: Iterable[Shown], num_recursions: int, title: str) -> str:
    """A text as a self-contained HTML page: the darker a token, the deeper it went."""
    spans = []
    for piece, depth in tokens:
        text = html.escape(piece).replace("\n", "&#8629;<br>")
        spans.append(f'<span style="background:{_shade(depth, num_recursions)}" title="depth {depth}">{text}</span>')
    key = " ".join(
        f'<span style="background:{_shade(depth, num_recursions)}">&nbsp;{depth}&nbsp;</span>'
        for depth in range(1, num_recursions + 1)
    )
    return _document(title, f"<p>recursions: {key}</p>\n<p class=text>{''.join(spans)}</p>")


def table_page(tokens: list[Shown], num_recursions: int, title: str, means: dict[str, tuple[float, int]]) -> str:
    """Tokens x recursions and the means by class, as an HTML page."""
    head = "".join(f"<th>{r + 1}</th>" for r in range(num_recursions))
    rows = [f"<tr><th>token</th>{head}</tr>"]
    for piece, depth in tokens:
        cells = "".join(
            f'<td style="background:{_shade(r + 1, num_recursions) if r < depth else "none"}"></td>'
            for r in range(num_recursions)
        )
        rows.append(f"<tr><td><code>{html.escape(repr(piece)[1:-1])}</code></td>{cells}</tr>")
    summary = "".join(f"<tr><td>{name}</td><td>{mean:.2f}</td><td>{n}</td></tr>" for name, (mean, n) in means.items())
    body = (
        f"<table><tr><th>class</th><th>mean depth</th><th>tokens</th></tr>{summary}</table>\n"
        f"<table>{''.join(rows)}</table>"
    )
    return _document(title, body)


def heat_map(tokens: list[Shown], num_recursions: int, title: str, path: Path, width: int = 48) -> None:
    """Draw tokens x recursions as a picture, in strips of at most `width` tokens.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    width = min(width, len(tokens))
    strips = [tokens[i : i + width] for i in range(0, len(tokens), width)]
    figure = Figure(figsize=(0.26 * width + 1, (0.3 * num_recursions + 1.2) * len(strips) + 0.5))
    figure.suptitle(title)
    for axes, strip in zip(figure.subplots(len(strips), 1, squeeze=False)[:, 0], strips, strict=True):
        active = [[(r + 1) * (r < depth) for _, depth in strip] for r in range(num_recursions)]
        axes.imshow(active, aspect="auto", cmap="Blues", vmin=0, vmax=num_recursions, interpolation="nearest")
        axes.set_xlim(-0.5, width - 0.5)
        labels = [_printable(piece) for piece, _ in strip]
        axes.set_xticks(range(len(strip)), labels, rotation=90, fontsize=7, family="monospace", parse_math=False)
        axes.set_yticks(range(num_recursions), [str(r + 1) for r in range(num_recursions)])
        axes.set_ylabel("recursion")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def token_class(piece: str) -> str:
    """The kind of a token, by its first visible character and whether it begins or continues a word."""
    visible = piece.strip()
    if not visible:
        return "white space"
    if visible[0].isdigit():
        return "number"
    if visible[0].isalpha():
        if piece[0].isspace() or visible[0].isupper():
            return "word, beginning"
        return "word, going on"
    return "punctuation"


def class_means(tokens: Iterable[Shown]) -> dict[str, tuple[float, int]]:
    """Mean depth and number of tokens of each class, the most common first."""
    depths: dict[str, list[int]] = defaultdict(list)
    for piece, depth in tokens:
        depths[token_class(piece)].append(depth)
    ordered = sorted(depths.items(), key=lambda item: -len(item[1]))
    return {name: (sum(values) / len(values), len(values)) for name, values in ordered}


def _step(depth: int, num_recursions: int, steps: int) -> int:
    """Map depths 1..Nr to steps 0..steps-1."""
    if num_recursions == 1:
        return 0
    return round((depth - 1) / (num_recursions - 1) * (steps - 1))


def _shade(depth: int, num_recursions: int) -> str:
    light = 92 - 40 * depth / num_recursions
    return f"hsl(210,80%,{light:.0f}%)"


def _printable(piece: str) -> str:
    text = piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\N{MIDDLE DOT}")
    return "".join(character if character.isprintable() else "?" for character in text)


def _document(title: str, body: str) -> str:
    style = "body{font-family:sans-serif;margin:2em}.text{line-height:1.8}td,th{padding:2px 8px}"
    return (
        f"<!doctype html>\n<html><head><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{style}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
