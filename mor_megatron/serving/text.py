"""The text of a continuation as it grows, and the strings that end it."""

from __future__ import annotations

from mor_megatron.inference.loading import StreamDecoder


class Text:
    """Decodes tokens one at a time and looks for stop strings.

    Args:
        decoder: of the tokens.
        stop: strings that end the text.
    """

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...]):
        self.decoder, self.stop = decoder, stop
        self.held = ""
        """The end of the text, as far as a stop string may begin in it."""
        self.found: str | None = None
        """The stop string that ended the text."""

    def next(self, token: int) -> str:
        """What a token adds to the text, as far as it can be shown."""
        return self._show(self.held + self.decoder.next(token))

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        rest = "" if self.found else self._show(self.held + self.decoder.rest())
        rest, self.held = rest + self.held, ""
        return rest

    def _show(self, text: str) -> str:
        places = {string: text.find(string) for string in self.stop}
        found = [(place, string) for string, place in places.items() if place >= 0]
        if found:
            place, self.found = min(found)
            self.held = ""
            return text[:place]
        keep = max((_overlap(text, string) for string in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if string.startswith(text[-n:])), 0)
