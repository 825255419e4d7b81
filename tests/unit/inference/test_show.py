"""The display of token depths."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mor_megatron.inference import show

TOKENS = [("The", 3), (" cat", 3), (" sat", 1), (",", 2), ("\n", 1), ("<b>", 2), (" 42", 1), ("ing", 1), ("$x_", 2)]


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.spans: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attributes):
        self.open = dict(attributes).get("title", "") if tag == "span" else None

    def handle_data(self, data):
        if getattr(self, "open", None):
            self.spans.append((data, self.open))
            self.open = None


def test_page_has_every_token_with_its_depth():
    parser = Text()
    parser.feed(show.page(TOKENS, 3, "a & b"))
    expected = [(piece.replace("\n", "↵"), f"depth {depth}") for piece, depth in TOKENS]
    assert parser.spans == expected
    shades = [show._shade(depth, 3) for depth in (1, 2, 3)]
    light = [int(re.search(r"(\d+)%\)", shade)[1]) for shade in shades]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 3


def test_table_marks_exactly_the_recursions_that_ran():
    page = show.table_page(TOKENS, 3, "t", show.class_means(TOKENS))
    rows = re.findall(r"<tr><td><code>.*?</tr>", page, re.DOTALL)
    assert [row.count("hsl") for row in rows] == [depth for _, depth in TOKENS]


def test_picture(tmp_path: Path):
    """One strip of four tokens and one of five are higher than one of nine."""
    show.heat_map(TOKENS, 3, "t", tmp_path / "one.png", width=9)
    show.heat_map(TOKENS, 3, "t", tmp_path / "two.png", width=5)
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.height > 1.5 * one.height
    assert len(set(one.convert("L").get_flattened_data())) > 3


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" cat", "word, beginning"),
        ("The", "word, beginning"),
        ("ing", "word, going on"),
        ("\n", "white space"),
        ("", "white space"),
        (" 42", "number"),
        (",", "punctuation"),
    ],
)
def test_classes(piece: str, kind: str):
    assert show.token_class(piece) == kind


def test_means():
    means = show.class_means(TOKENS)
    assert means["word, beginning"] == (7 / 3, 3)
    assert sum(count for _, count in means.values()) == len(TOKENS)


def test_depths_have_different_colours():
    for num_recursions in (2, 3, 4):
        colours = {show.terminal("x", depth, num_recursions) for depth in range(1, num_recursions + 1)}
        assert len(colours) == num_recursions
    assert show.terminal("x", 1, 1).endswith("x\x1b[0m")
