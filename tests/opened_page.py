"""A page in the browser with the gateway behind it, and the words for what a user does there.
Used by: pytest tests/test_page.py tests/test_page_talk.py
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from browser import chromium, watched_page

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective

pytest.importorskip("fastapi", reason="the server's libraries are not installed: pip install 'dpa[serve]'")
from fake_gateway import FakeGateway
from serving import in_thread

PRESETS = {"terse": {"helpfulness": 0.75, "verbosity": -0.66}, "full": {"helpfulness": 1.0}}


def space_of(*names: str, **options: Any) -> DirectionSpace:
    return DirectionSpace(tuple(Objective(name, {name: 1.0}, f"how much {name}") for name in names), **options)


TWO = space_of("helpfulness", "verbosity", presets=PRESETS)
THREE = space_of("helpfulness", "verbosity", "warmth", presets=PRESETS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Opened:
    """A page, the gateway behind it, and the words for what a user does."""

    def __init__(self, page: Any, gateway: FakeGateway, url: str) -> None:
        self.page, self.gateway, self.url = page, gateway, url

    def ready(self, finer: bool = True) -> "Opened":
        """Wait until it can be used; `finer` unfolds the fine adjustment."""
        self.page.wait_for_selector("html[data-ready]")
        if finer:
            self.page.evaluate("document.getElementById('finer').open = true")
        return self

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.click("#go")
        self.finished()

    def open_history(self) -> None:
        """Unfold the conversations that are kept, and wait: a browser tells a page of it in a task of its own."""
        self.page.evaluate(
            """() => new Promise((listed) => {
                const history = document.getElementById("history");
                history.addEventListener("toggle", listed, { once: true });
                history.querySelector("summary").click();
            })"""
        )

    def follow_link(self, address: str) -> None:
        """Put `#address` into the address bar, and wait: a browser tells a page of it in a task of its own."""
        self.page.evaluate(
            """(address) => new Promise((told) => {
                addEventListener("hashchange", told, { once: true });
                location.hash = address;
            })""",
            address,
        )

    def said(self, place: int = -1) -> list[tuple[str, str]]:
        """Who said what in the messages of a request."""
        return [(message["role"], message["content"]) for message in self.gateway.bodies[place]["messages"]]

    def finished(self) -> None:
        self.page.wait_for_selector("article[aria-busy]", state="detached")

    def axis(self) -> str:
        return self.page.locator("#front .axis").first.text_content()

    def press_level(self, k: int, level: int) -> None:
        # not forced: the box is pressed once it stands still, the page may be scrolling to the newest answer
        self.page.locator(f'input[name="level-{k}"][value="{level}"]').check()

    def levels(self) -> list[int]:
        return [int(box.get_attribute("value")) for box in self.page.locator("#levels input:checked").all()]

    def no_sideways_scrolling(self) -> None:
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.page.viewport_size["width"]


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Opened]]:
    with ExitStack() as stack:

        def visit(
            space: DirectionSpace = TWO, key: str | None = None, extra: Any = None, at: str = "/", **context: Any
        ):
            gateway = FakeGateway(space, key, **(extra or {}))
            url = stack.enter_context(in_thread(gateway.app))
            page = stack.enter_context(watched_page(browser, url + at, **context))
            return Opened(page, gateway, url)

        yield visit
