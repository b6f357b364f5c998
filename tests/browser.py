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
    """A browser with one tab. Closed again before other tests run: Playwright keeps an event loop in this thread."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            browser.new_context().new_page()
            yield browser
        finally:
            browser.close()


def answered_again(page: Any, timeout_ms: float = 30_000) -> None:
    """Wait until the steered answer is that of the direction which is set: it is asked a moment after the last turn."""
    told = page.locator("#numbers").inner_text()
    page.wait_for_selector(f"#steered:not([aria-busy]) .told:text-is('{told}')", timeout=timeout_ms)
    page.wait_for_selector("article[aria-busy]", state="detached", timeout=timeout_ms)


@contextmanager
def watched_page(
    browser: Any,
    url: str,
    script: str | None = None,
    viewport: dict[str, int] | None = None,
    color_scheme: str = "light",
    reduced_motion: str = "no-preference",
    **context: Any,
) -> Iterator[Any]:
    """The page at `url`; by the end nothing may have gone wrong in its console, nor another host been asked.

    It is shown in the browser's first tab, where nothing of an earlier page is left but what it stored under its own
    address; with a `script`, which runs before the page's own, or other options of a context in a context of its own.
    """
    wrong: list[str] = []
    home = urlsplit(url).netloc

    def requested(request: Any) -> None:
        if urlsplit(request.url).netloc not in ("", home):
            wrong.append(f"another host was asked: {request.url}")

    def said(message: Any) -> None:
        # A refused request is reported by the browser itself, whatever the page does about it.
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            wrong.append(f"console: {message.text}")

    def thrown(error: Any) -> None:
        wrong.append(f"exception: {error}")

    heard = {"request": requested, "console": said, "pageerror": thrown}
    own = browser.new_context(**context) if script or context else None
    if own and script:
        own.add_init_script(script)
    page = own.new_page() if own else browser.contexts[0].pages[0]
    page.set_default_timeout(30_000)
    page.set_viewport_size(viewport or {"width": 1280, "height": 900})
    page.emulate_media(color_scheme=color_scheme, reduced_motion=reduced_motion)
    for event, listener in heard.items():
        page.on(event, listener)
    try:
        page.goto(url)
        yield page
    finally:
        for event, listener in heard.items():
            page.remove_listener(event, listener)
        if own:
            own.close()
        else:
            page.goto("about:blank")
            page.context.clear_cookies()
            for other in page.context.pages[1:]:
                other.close()
    assert not wrong
