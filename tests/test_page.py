"""The page in a real browser, against a gateway without a model: its controls agree, its answers stream, it is usable
by keyboard, at phone width and through a screen reader.

pytest tests/test_page.py
"""

import json
import re
import subprocess
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from fake_gateway import MARKUP, PAGE, FakeGateway
from opened_page import THREE, TWO, Opened, browser, space_of, visit

from dpa.core.sentences import target_template_of
from dpa.core.targets import read_wish
from dpa.serve.shapes import direction_json

__all__ = ["browser", "visit"]  # fixtures

# --- one direction, every control ---


def test_every_control_shows_the_same_direction(visit):
    opened = visit().ready()
    page = opened.page
    page.click("#presets >> text=full")
    assert opened.levels() == [0]
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0"
    assert page.locator("#presets >> text=full").get_attribute("aria-pressed") == "true"

    opened.press_level(1, 1)
    assert opened.text("#words") == "More verbosity."
    assert opened.text("#numbers") == "helpfulness*85 + verbosity*52"
    assert page.locator(".dial").get_attribute("aria-valuenow") == "31"
    assert page.locator(".dial").get_attribute("aria-valuetext") == "+31°, More verbosity"
    assert page.input_value("#expression") == "helpfulness*85 + verbosity*52"
    assert page.locator("#presets >> text=full").get_attribute("aria-pressed") == "false"

    page.click("#presets >> text=terse")
    assert opened.levels() == [-1]
    assert opened.text("#numbers") == "helpfulness*75 + verbosity*-66"
    assert page.locator(".dial").get_attribute("aria-valuenow") == "-41"

    page.fill("#expression", "helpfulness*3 + verbosity")
    page.click("#expert button")
    page.wait_for_selector('.dial[aria-valuenow="18"]')
    assert opened.text("#numbers") == "helpfulness*95 + verbosity*32"
    assert opened.levels() == [1]

    opened.press_level(1, 0)
    assert opened.levels() == [0]
    assert opened.text("#words") == "Helpfulness first."


def test_the_dial_turns_by_keys_and_by_dragging_and_stops_where_training_stopped(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=full")
    dial = opened.page.locator(".dial")
    dial.focus()
    opened.page.keyboard.press("ArrowLeft")
    assert dial.get_attribute("aria-valuenow") == "-1"
    opened.page.keyboard.press("PageUp")
    assert dial.get_attribute("aria-valuenow") == "9"
    opened.page.keyboard.press("End")
    opened.page.keyboard.press("ArrowRight")
    assert dial.get_attribute("aria-valuenow") == "45"

    box = dial.bounding_box()
    middle, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"] * 128 / 150
    opened.page.mouse.move(middle, bottom - 60)
    opened.page.mouse.down()
    assert dial.get_attribute("aria-valuenow") == "0"
    opened.page.mouse.move(middle - 40, bottom - 69)
    assert dial.get_attribute("aria-valuenow") == "-30"
    opened.page.mouse.move(middle - 80, bottom - 5)
    assert dial.get_attribute("aria-valuenow") == "-45", "the greyed, untrained part cannot be chosen"
    opened.page.mouse.up()
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*-71"


def test_more_objectives_have_sliders_and_the_others_give_way_at_the_end_of_the_cone(visit):
    opened = visit(THREE).ready()
    opened.page.click("#presets >> text=full")
    sliders = opened.page.locator("#sliders input")
    assert sliders.count() == 2, "the center's own objective has no arc"
    sliders.nth(0).focus()
    opened.page.keyboard.press("End")
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*71 + warmth*0"
    sliders.nth(1).focus()
    for _ in range(3):
        opened.page.keyboard.press("PageDown")
    assert int(sliders.nth(1).input_value()) < -20
    assert int(sliders.nth(0).input_value()) < 98
    direction = THREE.parse(opened.text("#numbers"))
    assert THREE.angle_to_center(np.array([direction.weights]))[0] == pytest.approx(45, abs=0.6)

    opened.press_level(2, 1)
    assert opened.levels() == [1, 1]
    assert opened.text("#words") == "More verbosity and more warmth."


def test_the_front_is_picked_by_click_and_by_key_and_shows_where_the_direction_stands(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=full")
    points = opened.page.locator("#front [role=radio]")
    assert points.count() == 9
    assert points.nth(4).get_attribute("aria-checked") == "true"
    points.nth(0).locator(".dot").click()
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*-71"
    assert "Much less verbosity: true reward helpfulness" in points.nth(0).get_attribute("aria-label")
    points.nth(0).focus()
    opened.page.keyboard.press("ArrowRight")
    assert points.nth(1).get_attribute("aria-checked") == "true"
    assert points.nth(1).evaluate("node => node === document.activeElement")
    assert opened.text("#numbers") == "helpfulness*83 + verbosity*-56"

    ends = [points.nth(n).locator(".dot").bounding_box() for n in (4, 5)]
    between = [sum(end[side] + end[size] / 2 for end in ends) / 2 for side, size in (("x", "width"), ("y", "height"))]
    opened.page.mouse.click(*between)
    assert opened.page.locator("#front .here.between").count() == 1
    assert 4 < int(opened.page.locator(".dial").get_attribute("aria-valuenow")) < 7.5


def test_the_objective_along_the_front_is_chosen_where_there_are_several(visit):
    opened = visit(THREE).ready()
    assert opened.axis() == "verbosity, true reward →"
    opened.page.select_option("#x-axis", "warmth")
    assert opened.axis() == "warmth, true reward →"
    opened.page.locator("#front [role=radio]").nth(0).locator(".dot").click()
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*0 + warmth*-71"
    assert opened.page.locator("#front [role=radio]").count() == len(THREE.grid(9))


def test_no_measured_point_lies_where_nothing_is_said_to_be_trained(visit):
    front = FakeGateway(THREE).front()
    aside = next(point for point in front if point["weights"].get("warmth", 0) > 0.5)
    aside["objectives"]["verbosity"] = {"value": 95, "low": 94, "high": 96}
    opened = visit(THREE, extra={"front": front}).ready()
    dots, grey = [
        opened.page.locator(f"#front {these}").evaluate_all(
            "all => all.map((one) => one.getBBox()).map(({ x, width }) => [x, x + width])"
        )
        for these in (".dot", ".untrained")
    ]
    assert len(dots) == len(front)
    assert not [dot for dot in dots for band in grey if band[0] < dot[1] and dot[0] < band[1]]


def test_long_names_are_cut_with_the_whole_in_the_title_and_stay_in_the_picture(visit):
    first, second = "an-objective-whose-name-is-longer-than-any-picture", "another-objective-whose-name-is-as-long"
    opened = visit(space_of(first, second)).ready()
    for picture in ("#dial-box svg", "#front svg"):
        assert opened.page.locator(picture).evaluate(
            """svg => { const frame = svg.getBoundingClientRect();
            const isIn = (box) => box.left >= frame.left && box.right <= frame.right
                && box.top >= frame.top && box.bottom <= frame.bottom;
            return [...svg.querySelectorAll("text")].every((text) => isIn(text.getBoundingClientRect())); }"""
        )
    titles = opened.page.locator("svg text > title").all_text_contents()
    assert titles == [f"less {second}", f"more {second}", f"{second}, true reward →", f"{first} →"]
    less, more = [opened.page.locator(f"#dial-box text:has-text('{way}')").bounding_box() for way in ("less", "more")]
    assert less["x"] + less["width"] < more["x"]


def test_without_a_measured_front_everything_else_works(visit):
    opened = visit(THREE, extra={"front": None, "scorer": False, "presets": {}}).ready()
    assert "No measurement" in opened.text("#front-note")
    assert not opened.page.locator("#front").is_visible()
    opened.press_level(1, -1)
    opened.ask("What is the home of Ivy?")
    assert "fewer than the default" in opened.text("#steered .count")


def test_an_expression_is_refused_in_the_servers_words_and_the_nearest_trained_one_offered(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=full")
    opened.page.fill("#expression", "helpfulness*0.1 - verbosity")
    opened.page.click("#expert button[type=submit]")
    opened.page.wait_for_selector("#expression-error button")
    assert "the policy was trained from -45deg to 45deg" in opened.text("#expression-error")
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0"
    opened.page.click("#expression-error button")
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*-71"
    assert opened.text("#expression-error") == ""
    opened.page.fill("#expression", "helpfulnes*1")
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector("#expression-error:has-text('did you mean `helpfulness`?')")


@pytest.mark.parametrize(
    "space",
    [
        TWO,
        THREE,
        space_of("a", "b", center={"a": 1, "b": 1}, max_angle=30),
        space_of("a", "b", "c", "d", center={"a": 2, "b": 1, "c": -1}, max_angle=70),
        space_of("a", "b", center={"b": -1}, max_angle=120),
    ],
    ids=["two", "three", "diagonal", "four", "backwards"],
)
def test_the_pages_arithmetic_is_that_of_the_package(visit, space):
    """What the page prints is what the server prints, and the server accepts whatever the controls can reach."""
    opened = visit(at="/space.js")
    weights_DK = space.sample(60, np.random.default_rng(0))
    script = """async ([data, weights]) => {
        const { Space } = await import("/space.js");
        const space = new Space(data);
        const stays = (w) => space.rounded(w).every((value, k) => value === w[k]);
        const of = (w) => ({ sent: space.mapping(w), text: space.text(w), angle: space.angle(w), stays: stays(w) });
        return weights.map((weight) => {
            const w = space.rounded(weight);
            const reached = space.names.flatMap((_, k) => [
                ...(space.adjustable.includes(k) ? [-1, 0, 1] : [])
                    .map((level) => [k, level, space.withLevel(w, k, level)]),
                ...(space.poles[k] ? [-1, 0.5].map((lean) => [k, null, space.withLeaning(w, k, lean)]) : []),
                ...(space.poles[k] ? space.across(k).map((to) => [k, null, to]) : []),
            ]);
            // Where the center is several objectives, one direction can be said in several ways.
            const one = space.anchor >= 0 || space.names.length === 2;
            const shown = (k, level, to) => space.levels(to, one ? null : { k, level })[k];
            return { ...of(w), reached: reached.map(([k, level, to]) => [level, shown(k, level, to), of(to)]) };
        });
    }"""
    data = {
        "objectives": [{"name": name} for name in space.names],
        "center": dict(zip(space.names, space.center_K.tolist(), strict=True)),
        "max_angle": space.max_angle,
    }
    for weights_K, found in zip(weights_DK, opened.page.evaluate(script, [data, weights_DK.tolist()]), strict=True):
        assert found["text"] == str(space.parse(found["sent"]))
        assert found["stays"], "what was rounded once stays, in a link and in the history"
        assert found["angle"] == pytest.approx(space.angle_to_center(weights_K[None])[0], abs=0.1)
        for level, shown, direction in found["reached"]:
            assert direction["text"] == str(space.parse(direction["sent"])) and direction["stays"]
            assert level in (None, shown), "a pressed button stays pressed"


# --- asking ---


def test_both_answers_come_with_the_same_seed_and_differ_in_the_direction_only(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=terse")
    opened.ask("What is the home of Ivy?")
    plain, steered = sorted(opened.gateway.bodies, key=lambda body: len(body["dpa"]))
    assert steered.pop("dpa") == {"helpfulness": 0.751, "verbosity": -0.661}
    assert plain.pop("dpa") == {"helpfulness": 1}
    assert steered == plain
    assert plain["messages"] == [{"role": "user", "content": "What is the home of Ivy?"}]
    assert plain["stream"] is True
    assert len(opened.text("#default .text").split()) == 20
    assert len(opened.text("#steered .text").split()) == 7
    assert opened.text("#default .told") == "helpfulness*100 + verbosity*0"
    assert opened.text("#steered .told") == "helpfulness*75 + verbosity*-66"
    assert opened.text("#steered .count") == "7 words, 13 fewer than the default"
    assert opened.page.locator("#steered .bars dt").all_inner_texts() == ["helpfulness", "verbosity"]
    assert opened.page.locator("#steered .bars b").all_inner_texts() == ["37", "42"]
    assert opened.text("#status") == "Both answers are there: 20 words, and steered 7 words."


def test_steering_asks_again_for_the_steered_answer_only(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=full")
    opened.ask("What is the home of Ivy?")
    assert len(opened.gateway.bodies) == 2
    opened.page.click("#presets >> text=terse")
    opened.page.wait_for_selector("#steered .count:has-text('13 fewer than the default')")
    assert [body.get("dpa") for body in opened.gateway.bodies[2:]] == [{"helpfulness": 0.751, "verbosity": -0.661}]

    opened.page.click("#settings summary")
    opened.page.uncheck("#follow")
    opened.press_level(1, 1)
    assert "earlier" in opened.page.locator("#steered").get_attribute("class")
    opened.page.wait_for_timeout(600)
    assert len(opened.gateway.bodies) == 3


def test_the_base_model_stands_beside_it_on_request(visit):
    opened = visit(extra={"base": True}).ready()
    opened.page.click("#settings summary")
    opened.page.select_option("#compare", "base")
    opened.page.click("#presets >> text=terse")
    opened.ask("What is the home of Ivy?")
    assert {body["model"]: "dpa" in body for body in opened.gateway.bodies} == {"fake": True, "fake@base": False}
    assert opened.text("#default h3") == "Told no direction"
    assert opened.text("#default .told") == "no direction stated"
    opened.page.wait_for_url(lambda url: "vs=base" in url)  # the link follows after a moment


def test_what_is_compared_with_is_a_request_that_states_nothing_where_the_server_has_no_default(visit):
    opened = visit(extra={"default": None}).ready()
    assert opened.page.locator("#compare option").all_text_contents() == ["no direction, as by default"]
    opened.ask("What is the home of Ivy?")
    assert sorted("dpa" in body for body in opened.gateway.bodies) == [False, True]
    assert opened.text("#default h3") == "Default: no direction"
    assert opened.text("#default .told") == "no direction stated"
    opened.press_level(1, 0)
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0", "the controls start at the center"


def test_another_seed_asks_both_again(visit):
    opened = visit().ready()
    opened.ask("What is the home of Ivy?")
    opened.page.click("#reseed")
    opened.finished()
    seeds = [body["seed"] for body in opened.gateway.bodies]
    assert len(seeds) == 4
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert opened.page.input_value("#seed") == str(seeds[2])
    opened.page.wait_for_url(lambda url: f"seed={seeds[2]}" in url)


def test_stop_ends_the_answers_here_and_on_the_server(visit):
    opened = visit().ready()
    stop = opened.page.locator("#stop")
    assert stop.is_visible() and stop.is_disabled()
    opened.page.fill("#question", "slow")
    opened.page.keyboard.press("Control+Enter")
    opened.page.wait_for_selector("#steered .text:has-text('word2')")
    assert opened.page.locator("#steered").get_attribute("aria-busy") == "true"
    opened.page.mouse.wheel(0, 4000)
    opened.page.wait_for_timeout(100)
    assert stop.is_enabled()
    box = stop.bounding_box()
    assert 0 < box["y"] < 900 - box["height"], "it is in sight wherever one has scrolled to"
    stop.click()
    opened.finished()
    assert opened.page.evaluate("document.activeElement.id") == "question", "nobody loses the focus"
    assert opened.text("#steered .state") == "stopped"
    assert opened.text("#status") == "Stopped."
    assert "word0 word1 word2" in opened.text("#steered .text")
    assert opened.gateway.stopped.wait(30)


def test_a_busy_server_is_said_kindly_and_can_be_asked_again_when_it_said(visit):
    opened = visit().ready()
    opened.ask("busy")
    again = opened.page.locator("#steered .trouble button")
    assert "hands full" in opened.text("#steered .trouble")
    assert re.search("in [123] s", opened.text("#steered .trouble"))
    assert again.is_disabled()
    again.click()  # waits until it can be pressed
    opened.page.wait_for_selector("#steered .count:has-text('7 words')")
    assert not opened.page.locator("#steered .trouble").is_visible()


@pytest.mark.parametrize(
    ("question", "state", "sentence"),
    [
        ("broken", "no answer", "engine: it failed; look at its log."),
        ("dies", "broken off", "engine: it died; ask again."),
        ("cut", "broken off", "The answer broke off before its end."),
    ],
)
def test_what_went_wrong_is_said_beside_what_was_written(visit, question, state, sentence):
    opened = visit().ready()
    opened.ask(question)
    assert opened.text("#steered .state") == state
    assert sentence in opened.text("#steered .trouble")
    assert opened.text("#status") == sentence
    assert opened.text("#steered .text") == ("" if question == "broken" else "word0 word1 word2")


def test_what_a_model_writes_is_text_never_markup(visit):
    opened = visit().ready()
    opened.ask("markup")
    assert opened.text("#steered .text") == MARKUP
    assert opened.page.locator(".text :not(ins, del)").count() == 0
    assert opened.page.title() == "fake: ask, and say which way to go"
    for file in PAGE.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", file.read_text())


# --- what is taken along ---


def test_a_link_restores_the_whole_state_and_asks_nothing_by_itself(visit):
    opened = visit(THREE).ready()
    page = opened.page
    page.click("#key-box summary")
    page.fill("#key", "secret-key")
    page.fill("#question", 'What\'s "home" & <Ivy>?\nSecond line + 100%')
    opened.press_level(2, 1)
    page.click("#settings summary")
    for field, value in {"#seed": "77", "#temperature": "0.3", "#max-tokens": "99"}.items():
        page.fill(field, value)
    page.select_option("#x-axis", "warmth")
    page.click("#copy-link")
    link = page.evaluate("location.href")
    assert "secret-key" not in link

    second = page.context.new_page()
    second.goto(link)
    second.wait_for_selector("html[data-ready]")
    restored = Opened(second, opened.gateway, opened.url)
    for selector in ("#numbers", "#words"):
        assert restored.text(selector) == opened.text(selector)
    assert restored.axis() == opened.axis() == "warmth, true reward →"
    assert restored.levels() == opened.levels()
    assert second.input_value("#question") == 'What\'s "home" & <Ivy>?\nSecond line + 100%'
    assert [second.input_value(field) for field in ("#seed", "#temperature", "#max-tokens")] == ["77", "0.3", "99"]
    assert second.input_value("#key") == ""
    assert opened.gateway.bodies == []


def test_a_link_that_does_not_fit_the_model_says_so(visit):
    opened = visit(at="/#d=honesty:1&seed=-4&t=900&n=1e9").ready()
    for direction in (
        "",
        "helpfulness:0.1,verbosity:-1",
        "helpfulness:x",
        "helpfulness:0",
        "helpfulness:1",
        "honesty:1",
    ):
        opened.follow_link(f"d={direction}&seed=-4&t=900&n=1e9")
        fits = direction == "helpfulness:1"
        assert opened.page.locator("#notice").is_hidden() == fits
        if not fits:
            assert "does not fit this model" in opened.text("#notice")
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0", "the last that did"


def test_a_link_is_followed_although_the_page_writes_its_own_address_at_that_moment(visit):
    opened = visit().ready()
    opened.page.evaluate(
        """() => new Promise((told) => {
            addEventListener("hashchange", told, { once: true });
            const own = location.href;
            location.hash = "d=helpfulness:1";
            history.replaceState(null, "", own + "#d=helpfulness:0.8,verbosity:-0.6");
        })"""
    )
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0"
    assert [opened.page.input_value(field) for field in ("#seed", "#temperature")] == ["1", "0.7"]


NASTY = 'It\'s "quoted", costs $5 `now`, \\n stays, ünïcode 🙂\nand a second line'


def test_every_snippet_sends_exactly_what_the_page_sends(visit):
    opened = visit().ready()
    opened.page.click("#presets >> text=terse")
    opened.ask(NASTY)
    sent = max(opened.gateway.bodies, key=lambda body: len(body["dpa"]))
    sent = {name: value for name, value in sent.items() if name not in ("stream", "dpa_options")}
    direction = sent.pop("dpa")
    opened.gateway.bodies.clear()

    snippets = {}
    for kind in ("curl", "python", "stock"):
        opened.page.click(f"#tab-{kind}")
        snippets[kind] = opened.page.locator("#snippet").text_content()
    # Through a file: the page's text is what a user pastes into a terminal.
    answered = subprocess.run(["bash", "-c", snippets["curl"]], capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)["dpa"]["direction"] == "helpfulness*75 + verbosity*-66"
    pytest.importorskip("openai", reason="the openai client is not installed: pip install -e '.[dev]'")
    for kind in ("python", "stock"):
        exec(compile(snippets[kind], kind, "exec"), {})
    curl, python, stock = opened.gateway.bodies
    assert curl == python == {**sent, "dpa": direction}
    assert stock == {**sent, "chat_template_kwargs": {"preference": direction}}


def test_a_request_is_written_out_in_a_pause_and_at_once_where_it_is_copied(visit):
    opened = visit(permissions=["clipboard-read", "clipboard-write"]).ready()
    page = opened.page
    page.evaluate(
        """() => { window.written = 0;
        new MutationObserver((all) => { written += all.length; })
            .observe(document.querySelector("#snippet code"), { childList: true });
        const box = document.getElementById("question");
        for (let n = 1; n <= 30; n++) {
            box.value = `question ${n}`;
            box.dispatchEvent(new Event("input"));
        } }"""
    )
    page.wait_for_selector("#snippet:has-text('question 30')")
    assert page.evaluate("written") <= 2, "not once a keystroke"
    page.evaluate(
        """() => { const box = document.getElementById("question");
        box.value = "the last";
        box.dispatchEvent(new Event("input"));
        document.getElementById("copy-snippet").click(); }"""
    )
    page.wait_for_selector("#copy-snippet:has-text('Copied')")
    assert "the last" in page.evaluate("navigator.clipboard.readText()")


def test_a_key_is_asked_for_kept_in_the_tab_and_never_written_into_a_snippet(visit):
    opened = visit(key="open-sesame")
    page = opened.page
    page.wait_for_selector("#notice:has-text('asks for a key')")
    assert page.locator("#key").evaluate("node => node === document.activeElement")
    page.fill("#key", "open-sesame")
    page.keyboard.press("Enter")
    opened.ready()
    opened.ask("What is the home of Ivy?")
    assert opened.text("#default .count") == "20 words"
    assert page.evaluate("[sessionStorage.getItem('dpa-key'), document.cookie]") == ["open-sesame", ""]
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert "What is the home of Ivy?" in kept
    assert "sesame" not in kept
    page.wait_for_timeout(400)
    assert "sesame" not in page.evaluate("location.href")
    for kind, variable in (("curl", "$DPA_API_KEY"), ("python", 'os.environ["DPA_API_KEY"]')):
        page.click(f"#tab-{kind}")
        assert variable in page.locator("#snippet").text_content()
        assert "sesame" not in page.locator("#snippet").text_content()


def test_a_wrong_key_is_put_right_and_the_answers_asked_again_with_it(visit):
    opened = visit(key="open-sesame")
    page = opened.page
    page.fill("#key", "“open-sesame”")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:has-text('a character that cannot be sent')")
    page.fill("#key", "open-sesame")
    page.keyboard.press("Enter")
    opened.ready()
    page.click("#key-box summary")
    for wrong, sentence in (("wrong", "it is missing or wrong"), ("“open-sesame”", "cannot be sent")):
        page.fill("#key", wrong)
        opened.ask("slow")
        assert sentence in opened.text("#steered .trouble")
        assert page.locator("#notice").is_visible() and page.locator("#key").is_visible()
    page.fill("#key", "open-sesame")
    assert page.locator("#notice").is_hidden(), "it was about another key"
    page.locator("#steered .trouble button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#steered .text").evaluate("node => node === document.activeElement"), "nobody loses the focus"
    page.wait_for_selector("#steered .text:has-text('word2')")
    page.click("#stop")
    opened.finished()
    assert opened.text("#steered .state") == "stopped"


# --- for everyone ---


@pytest.mark.parametrize(("space", "scheme"), [(TWO, "light"), (THREE, "dark")], ids=["dial", "sliders"])
def test_no_accessibility_rule_is_broken(visit, space, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    opened = visit(space, color_scheme=scheme).ready()
    opened.page.click("#presets >> text=terse")
    for sight in ("first", "asked", "swept"):
        if sight == "asked":
            opened.ask("What is the home of Ivy?")
            opened.ask("What is the fear of Ivy?")
            opened.page.click("#settings summary")
        if sight == "swept":
            opened.page.click("#sweep")
            opened.finished()
            opened.open_history()
        found = axe.Axe().run(opened.page)
        assert found.response["passes"], "axe looked at nothing"
        assert found.violations_count == 0, f"{sight}: {found.generate_report()}"


def test_everything_is_reached_by_tab_and_the_focus_is_seen(visit):
    opened = visit().ready()
    opened.ask("What is the home of Ivy?")
    opened.page.click("h1")  # Tab goes on from there
    reached = []
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        place, seen = opened.page.evaluate(
            """() => { const node = document.activeElement, style = getComputedStyle(node);
            const beside = node.nextElementSibling && getComputedStyle(node.nextElementSibling);
            const halo = node.querySelector?.(".halo");
            const seen = [style.outlineStyle, beside?.outlineStyle].includes("solid")
                || (halo && getComputedStyle(halo).stroke !== "none");
            return [node.id || node.getAttribute("name") || node.getAttribute("class") || node.tagName, seen]; }"""
        )
        if place in ("BODY", ""):
            break
        assert seen, f"{place} is focused and nothing shows it"
        reached.append(place)
    expected = ["new", "question", "go", "sweep", "marks", "reseed", "text", "text", "level-1", "dial", "expression"]
    expected += ["point", "tab-curl", "snippet"]
    assert [place for place in reached if place in expected] == expected


def test_the_first_tab_stop_skips_to_the_question_and_then_to_the_answers_and_changes_nothing(visit):
    opened = visit(extra={"base": True}).ready()
    page = opened.page

    def skip_to(place: str) -> None:
        skip = page.locator("#skip")
        skip.focus()
        assert opened.text("#skip") == f"Skip to the {place}"
        assert skip.bounding_box()["y"] >= 0, "it is seen where it has the focus"
        told = page.evaluate_handle("({ once: new Promise((told) => { addEventListener('hashchange', told); }) })")
        page.keyboard.press("Enter")
        told.evaluate("async (told) => { await told.once; }")
        assert page.evaluate("document.activeElement.id") == place

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.click("#settings summary")
    page.select_option("#compare", "base")
    skip_to("question")
    opened.ask("What is the home of Ivy?")
    skip_to("answers")
    assert page.input_value("#compare") == "base"
    page.wait_for_url(lambda url: "vs=base" in url and "d=" in url)


def test_phone_width_needs_no_sideways_scrolling(visit):
    long = space_of("helpfulness", "a-very-long-objective-name-without-any-break-in-it", "warmth", "honesty")
    opened = visit(long, viewport={"width": 360, "height": 740}, reduced_motion="reduce").ready()
    opened.no_sideways_scrolling()
    opened.press_level(1, 1)
    opened.ask("W" * 300)
    opened.no_sideways_scrolling()
    assert 0 <= opened.page.locator("#answers").bounding_box()["y"] < 740, "asking leads to the answers"
    opened.page.click("#settings summary")
    opened.no_sideways_scrolling()
    opened.page.click("#key-box summary")
    opened.no_sideways_scrolling()
    opened.open_history()
    opened.no_sideways_scrolling()
    opened.page.click("#sweep")
    opened.finished()
    opened.no_sideways_scrolling()


def test_who_wants_no_motion_gets_none(visit):
    opened = visit(reduced_motion="reduce").ready()
    opened.page.fill("#question", "slow")
    opened.page.click("#go")
    opened.page.wait_for_selector("#steered[aria-busy] .state:has-text('writing')")
    assert (
        opened.page.evaluate("getComputedStyle(document.querySelector('#steered .text'), '::after').animationName")
        == "none"
    )
    opened.page.click("#stop")


# --- targets ---


def test_an_objective_is_held_at_a_value_where_the_policy_knows_targets(visit):
    opened = visit(replace(THREE, target_template=target_template_of(THREE.template))).ready()
    page = opened.page
    page.click("#presets >> text=full")
    page.click("#holding summary")
    page.check("#hold-1")
    page.fill("#value-1", "40")
    assert opened.text("#words") == "Helpfulness first, verbosity at 40."
    assert opened.text("#numbers") == "helpfulness*100 + warmth*0; verbosity=40"
    assert page.is_disabled("#slider-1") and page.is_enabled("#slider-2")
    opened.press_level(2, 1)
    assert opened.text("#words") == "More warmth, verbosity at 40."
    opened.ask("Why?")
    (sent,) = [body["dpa"] for body in opened.gateway.bodies if "verbosity" in body["dpa"]]
    assert sent["verbosity"] == "=40" and sent["warmth"] > 0
    assert "verbosity=40" in page.locator("#steered .told").inner_text()
    page.wait_for_url(lambda url: "verbosity:=40" in unquote(url))

    page.reload()
    opened.ready()
    assert opened.text("#numbers").endswith("; verbosity=40") and page.is_checked("#hold-1")
    page.fill("#expression", "helpfulness; warmth=75")
    page.click("#expert button")
    page.wait_for_selector("#hold-2:checked")
    assert opened.text("#numbers") == "helpfulness*100 + verbosity*0; warmth=75"
    page.click("#presets >> text=terse")
    assert opened.text("#numbers") == "helpfulness*75 + verbosity*-66 + warmth*0"


def test_where_the_center_is_of_several_what_is_free_is_measured_from_what_is_free_of_it(visit):
    space = replace(
        THREE, center={"helpfulness": 1, "verbosity": 1, "warmth": 1}, max_angle=30, presets={},
        target_template=target_template_of(THREE.template),
    )  # fmt: skip
    opened = visit(space).ready()
    opened.page.fill("#expression", "helpfulness + verbosity; warmth=40")
    opened.page.click("#expert button")
    opened.page.wait_for_selector("#hold-2:checked")
    assert opened.text("#numbers") == "helpfulness*71 + verbosity*71; warmth=40"
    assert opened.text("#angle") == "the middle of what was trained"
    opened.page.wait_for_url(lambda url: "warmth:=40" in unquote(url))
    opened.page.reload()
    assert opened.ready().text("#numbers") == "helpfulness*71 + verbosity*71; warmth=40"


def test_a_policy_that_knows_no_targets_offers_none_and_says_so(visit):
    opened = visit(THREE).ready()
    assert opened.page.is_hidden("#holding")
    opened.page.fill("#expression", "helpfulness; verbosity=40")
    opened.page.click("#expert button")
    opened.page.wait_for_selector("#expression-error:not(:empty)")
    assert "knows no targets" in opened.text("#expression-error")


def test_what_is_compared_with_is_the_servers_target_where_that_is_its_default(visit):
    space = replace(THREE, target_template=target_template_of(THREE.template))
    opened = visit(space, extra={"default": direction_json(read_wish(space, "helpfulness; verbosity=40"))}).ready()
    opened.page.click("#presets >> text=full")
    opened.ask("Why?")
    told = [body["dpa"] for body in opened.gateway.bodies]
    (plain,) = [wish for wish in told if wish.get("verbosity") == "=40"]
    assert len(told) == 2 and plain["helpfulness"] == 1 and not plain.get("warmth")
