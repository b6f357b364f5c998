"""Debian's Chromium, driven by Playwright, for the tests of the page; they skip where either is absent.
Used by: pytest tests/test_page.py tests/test_page_end_to_end.py
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Closed again before other tests run: Playwright keeps an event loop in this thread."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(browser: Any, url: str, script: str | None = None, **context: Any) -> Iterator[Any]:
    """The page at `url`; by the end nothing may have gone wrong in its console, nor another host been asked.

    `script` runs before the page's own.
    """
    wrong: list[str] = []
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    try:
        if script:
            opened.add_init_script(script)
        page = opened.new_page()
        page.set_default_timeout(10_000)
        home = urlsplit(url).netloc

        def requested(request: Any) -> None:
            if urlsplit(request.url).netloc not in ("", home):
                wrong.append(f"another host was asked: {request.url}")

        def said(message: Any) -> None:
            # A refused request is reported by the browser itself, whatever the page does about it.
            if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
                wrong.append(f"console: {message.text}")

        page.on("request", requested)
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        page.goto(url)
        yield page
    finally:
        opened.close()
    assert not wrong
