"""The page before a real `dpa serve` and a policy that obeys: picking on the front changes the answer as it says.

pytest tests/test_page_end_to_end.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import answered_again, chromium, watched_page

pytest.importorskip("fastapi", reason="the server's libraries are not installed: pip install 'dpa[serve]'")
from obedient_policy import QUESTIONS, save_obedient_policy
from serving import FakeUpstream, ServeProcess, gateway_before, in_thread, settings_with

from dpa.world.answers import count_words, read_answer


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = save_obedient_policy(tmp_path_factory.mktemp("page") / "policy", measured=True)
    server = ServeProcess(folder, "--name", "demo", "--threads", 1)
    try:
        yield server.wait().url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def test_the_two_answers_differ_as_the_direction_picked_on_the_front_says(url: str, browser: Any) -> None:
    with watched_page(browser, url, reduced_motion="reduce") as page:  # a front that glides away is clicked beside
        page.wait_for_selector("html[data-ready]")
        points = page.locator("#front [role=radio]")
        assert points.count() == 17

        def answer_at(point: int) -> tuple[str, str]:
            points.nth(point).locator(".dot").click()
            answered_again(page)
            return tuple(page.locator(f"#{card} .text").inner_text() for card in ("default", "steered"))

        for question in QUESTIONS[:2]:
            page.fill("#question", question.text)
            page.press("#question", "Enter")
            plain, terse = answer_at(0)
            assert page.locator("#numbers").inner_text() == "helpfulness*71 + verbosity*-71 + warmth*0"
            assert page.locator("#steered .told").inner_text() == "helpfulness*71 + verbosity*-71 + warmth*0"
            same, wordy = answer_at(4)
            assert same == plain, "the same seed and direction give the same answer"
            assert count_words(terse) < count_words(plain) < count_words(wordy)
            for answer in (plain, terse, wordy):
                facts = read_answer(answer).facts
                assert facts and set(facts) <= set(question.card), "it answers the question that was asked"
            assert "more than the default" in page.locator("#steered .count").inner_text()

        page.select_option("#x-axis", "warmth")
        _, cold = answer_at(0)
        _, warm = answer_at(4)
        assert read_answer(cold).warm < read_answer(warm).warm
        assert page.locator("#numbers").inner_text() == "helpfulness*71 + verbosity*0 + warmth*71"


def test_a_direction_the_policy_was_not_trained_for_is_refused_in_the_servers_words(url: str, browser: Any) -> None:
    with watched_page(browser, url) as page:
        page.wait_for_selector("html[data-ready]")
        page.click("#finer summary")
        page.fill("#expression", "warmth")
        page.click("#expert button")
        page.wait_for_selector("#expression-error button")
        assert "trained up to 45 degrees from" in page.locator("#expression-error").inner_text()
        page.click("#expression-error button")
        assert page.locator("#numbers").inner_text() == "helpfulness*71 + verbosity*0 + warmth*71"


KEY = "correct-horse-battery"


def test_behind_a_key_the_browser_asks_for_it_and_the_snippets_name_where_it_goes(browser: Any) -> None:
    fake = FakeUpstream()
    credentials = {"username": "any", "password": KEY}
    with (
        in_thread(fake.app) as engine,
        gateway_before(engine, settings_with(keys=(KEY,))) as address,
        watched_page(browser, address, http_credentials=credentials) as page,
    ):
        page.wait_for_selector("html[data-ready]")
        page.fill("#question", "Why?")
        page.click("#presets >> text=terse")
        page.click("#go")
        page.wait_for_selector("article[aria-busy]", state="detached")
        assert 'told {"helpfulness": 0.86' in page.locator("#steered .text").inner_text()
        page.wait_for_selector("#snippet:has-text('Authorization: Bearer $DPA_API_KEY')")
        assert KEY not in page.content() + page.evaluate("location.href + JSON.stringify(sessionStorage)")


def test_an_engine_that_dies_in_the_middle_is_told_and_can_be_asked_again(browser: Any) -> None:
    fake = FakeUpstream()
    with (
        in_thread(fake.app) as engine,
        gateway_before(engine, settings_with(front=None)) as address,
        watched_page(browser, address) as page,
    ):
        page.wait_for_selector("html[data-ready]")
        fake.mode = "die"
        page.fill("#question", "Why?")
        page.click("#go")
        page.wait_for_selector("article[aria-busy]", state="detached")
        assert page.locator("#steered .state").inner_text() == "broken off"
        assert page.locator("#steered .text").inner_text().startswith("told")
        assert page.locator("#steered .trouble p").inner_text()
        fake.mode = "answer"
        page.click("#steered .trouble button")
        page.wait_for_selector("#steered .trouble", state="hidden")
        page.wait_for_selector("article[aria-busy]", state="detached")
        assert "words" in page.locator("#steered .count").inner_text()
