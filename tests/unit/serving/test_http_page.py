"""The page in a real browser: type, generate, see depths, stop."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from chromium import PROGRAM, Chromium
from http_server import KEY, running

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@needs_chromium
def test_page(tmp_path: Path):
    with running(api_key=KEY) as server:
        browser = Chromium(tmp_path)
        try:
            _use(browser, server)
        finally:
            browser.close()
    assert browser.errors == []
    assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {server.url.split("/")[2]}


def _use(browser: Chromium, server) -> None:
    browser.call("Page.navigate", url=server.url)
    browser.wait_for("document.querySelector('#error')?.textContent.includes('API key')")
    browser.click("#key")
    browser.call("Input.insertText", text=KEY)
    browser.click("#prompt")
    browser.call("Input.insertText", text="the sea")
    browser.click("#generate")
    browser.wait_for("running === null && at('text').textContent.length > 0")

    # What the routers decide, as the engine's own answer tells.
    depths = browser.evaluate("[...document.querySelectorAll('#text span')].map(span => Number(span.dataset.depth))")
    assert len(depths) == 100
    assert set(depths) == {1, 2, 3}
    colours = "new Set([...document.querySelectorAll('#text span')].map(span => span.style.background)).size"
    assert browser.evaluate(colours) == 3
    mean = f"mean depth {sum(depths) / 100:.2f}"
    assert browser.evaluate("at('speed').textContent").endswith(mean)
    assert "tokens/s" in browser.evaluate("at('speed').textContent")
    if "SCREENSHOT" in os.environ:
        picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(os.environ["SCREENSHOT"]).write_bytes(base64.b64decode(picture))

    # A slider, and the stop button.
    browser.evaluate("at('depth').value = 2; at('length').value = 2000; at('form').dispatchEvent(new Event('input'))")
    browser.click("#generate")
    browser.wait_for("document.querySelectorAll('#text span').length > 5")
    browser.click("#stop")
    browser.wait_for("running === null")
    server.wait_until_quiet()
    known = "[...document.querySelectorAll('#text span[data-depth]')].map(span => Number(span.dataset.depth))"
    assert set(browser.evaluate(known)) == {2}
    assert browser.evaluate("document.querySelectorAll('#text span').length") < 1900
    assert browser.evaluate("at('error').textContent") == ""
