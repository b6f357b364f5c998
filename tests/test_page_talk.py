"""The page as a place to stay, in a real browser: a conversation of several turns, its history, the sweep, what differs
between two answers, everything by keyboard, and long answers without a stutter.

pytest tests/test_page_talk.py
"""

import json
from urllib.parse import unquote

import pytest
from browser import answered_again
from opened_page import PRESETS, THREE, Opened, browser, space_of, visit

__all__ = ["browser", "visit"]  # fixtures

IVY, BEE = "What is the home of Ivy?", "What is the fear of Bee?"
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True}


def words(count: int) -> str:
    return " ".join(f"word{n}" for n in range(count))


# --- a conversation ---


def test_every_turn_has_its_own_direction_and_the_whole_conversation_is_sent(visit):
    opened = visit().ready()
    opened.ask(IVY)
    opened.page.click("#presets >> text=full")
    answered_again(opened.page)
    opened.ask(BEE)
    opened.press_level(1, 1)
    answered_again(opened.page)
    opened.ask("And Ida?")
    before = [("user", IVY), ("assistant", words(20)), ("user", BEE), ("assistant", words(30))]
    assert opened.said(-1) == [*before, ("user", "And Ida?")]
    assert opened.said(-2) == opened.said(-1), "both answers go on from the steered one"
    facts = opened.page.locator(".past .facts")
    assert facts.count() == 4
    assert "Helpfulness first. 20 words; model reward: helpfulness 50, verbosity 55" in facts.nth(0).inner_text()
    assert "More verbosity. 30 words" in facts.nth(2).inner_text()
    assert opened.text("#asked") == "And Ida?"
    assert opened.page.input_value("#question") == ""
    opened.page.wait_for_selector(f"#snippet:has-text('{words(20)}')")  # the snippet sends it too


def test_a_turn_that_was_never_answered_is_not_sent_along_nor_any_where_that_is_set(visit):
    opened = visit(extra={"parameters": 135_000_000}).ready()
    assert not opened.page.locator("#toy").is_visible()
    opened.ask("broken")
    opened.ask(IVY)
    assert opened.said() == [("user", IVY)]
    assert opened.page.locator(".past").count() == 0
    opened.page.click("#settings summary")
    opened.page.uncheck("#memory")
    opened.ask(BEE)
    assert opened.said() == [("user", BEE)]


def test_enter_asks_shift_enter_breaks_the_line_a_word_being_composed_is_left_alone_an_example_asks_at_once(visit):
    opened = visit(extra={"examples": [IVY, BEE]}).ready()
    box = opened.page.locator("#question")
    box.focus()
    opened.page.keyboard.type("one")
    opened.page.keyboard.press("Shift+Enter")
    opened.page.keyboard.type("two")
    assert box.input_value() == "one\ntwo"
    box.evaluate(
        """node => { for (const more of [{ isComposing: true }, { keyCode: 229 }])
            node.dispatchEvent(new KeyboardEvent("keydown",
                { key: "Enter", bubbles: true, cancelable: true, ...more })); }"""
    )
    assert opened.gateway.bodies == [] and box.input_value() == "one\ntwo"
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector("#steered .count:has-text('7 words')")
    opened.finished()
    assert opened.said() == [("user", "one\ntwo")]
    assert opened.page.evaluate("document.activeElement.id") == "question"
    opened.page.click("#new")
    opened.page.click("#examples >> text=Bee")
    opened.page.wait_for_selector("#asked:has-text('Bee')")
    opened.finished()
    assert opened.said() == [("user", BEE)]
    assert not opened.page.locator("#welcome").is_visible()


def test_the_first_view_is_a_direction_whose_answer_differs(visit):
    opened = visit().ready()
    assert opened.text("#numbers") == "helpfulness*75 + verbosity*-66"
    assert opened.page.locator(".answer").count() == 0, "no empty cards"
    opened.ask(IVY)
    assert opened.text("#steered .text") != opened.text("#default .text")
    full, wordy, terse = {"helpfulness": 1}, {"helpfulness": 0.8, "verbosity": 0.6}, {"helpfulness": 1, "verbosity": -1}
    found = opened.page.evaluate(
        """async (cases) => { const { firstWeights } = await import("/state.js");
        const { Space } = await import("/space.js");
        const objectives = [{ name: "helpfulness" }, { name: "verbosity" }];
        return cases.map((presets) => {
            const space = new Space({ objectives, center: { helpfulness: 1 }, max_angle: 45, presets });
            return space.text(firstWeights(space)); }); }""",
        [
            {name: {"weights": weights} for name, weights in presets.items()}
            for presets in ({"full": full, "wordy": wordy, "terse": terse}, {"full": full, "wordy": wordy}, {})
        ],
    )
    assert found == [f"helpfulness*{h} + verbosity*{v}" for h, v in ((71, -71), (80, 60), (85, 52))]


# --- history ---


def test_conversations_survive_a_reload_and_are_opened_exported_and_deleted(visit):
    opened = visit().ready()
    page = opened.page
    opened.ask(IVY)
    opened.ask(BEE)
    page.reload()
    opened.ready()
    assert opened.text("#asked") == BEE
    assert opened.text("#steered .text") == words(7)
    assert opened.text("#steered .told") == "helpfulness*75 + verbosity*-66"
    assert opened.page.locator("#steered .bars b").all_inner_texts() == ["37", "42"]
    assert page.locator(".past .question").all_inner_texts() == [IVY]
    opened.ask("And Ida?")
    assert [who for who, _ in opened.said()] == ["user", "assistant", "user", "assistant", "user"]

    page.click("#new")
    assert page.locator("#welcome").is_visible()
    opened.ask("Something else?")
    assert opened.said() == [("user", "Something else?")]
    opened.open_history()
    rows = page.locator("#talks li")
    assert rows.locator("span").all_inner_texts() == ["Something else?", IVY]
    with page.expect_download() as loading:
        rows.nth(1).locator("text=Export").click()
    exported = json.loads(loading.value.path().read_text())
    assert [turn["question"] for turn in exported["turns"]] == [IVY, BEE, "And Ida?"]
    assert exported["turns"][0]["answers"][1]["direction"] == {"helpfulness": 0.751, "verbosity": -0.661}
    assert exported["turns"][0]["answers"][1]["model_reward"] == {"helpfulness": 37, "verbosity": 42}
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"] * 3

    rows.nth(1).locator(".talk-open").click()
    assert opened.text("#asked") == "And Ida?"
    assert len(opened.gateway.bodies) == 8, "opening asks nothing"
    page.wait_for_timeout(500)
    assert len(opened.gateway.bodies) == 8
    opened.open_history()
    rows.nth(1).locator("text=Delete").click()
    assert rows.locator("span").all_inner_texts() == ["Something else?"]
    assert page.locator("#welcome").is_visible(), "what is deleted is not left on the page"
    page.click("#delete-all")
    assert rows.count() == 1, "what cannot be undone is pressed twice"
    page.click("#delete-all")
    assert rows.count() == 0
    assert page.evaluate("localStorage.length") == 0


def test_opening_a_conversation_asks_nothing_wherever_the_direction_stands(visit):
    opened = visit(extra={"presets": {"nearly": {"weights": {"helpfulness": 0.995, "verbosity": 0.105}, "text": ""}}})
    page = opened.ready().page

    def nothing_is_asked(earlier: bool) -> None:
        page.wait_for_timeout(600)  # steering asks after 400 ms
        assert len(opened.gateway.bodies) == 2
        assert page.evaluate("JSON.parse(Object.values(localStorage)[0]).turns[0].answers[1].text") == words(22)
        assert ("earlier" in page.locator("#steered").get_attribute("class")) == earlier

    opened.ask(IVY)
    page.click("#settings summary")
    page.uncheck("#follow")
    opened.press_level(1, -1)
    page.wait_for_url(lambda url: "verbosity:-" in unquote(url))
    page.reload()
    opened.ready()
    assert page.is_checked("#follow")
    assert opened.text("#words") == "Less verbosity.", "the link's"
    nothing_is_asked(earlier=True)

    opened.open_history()
    page.click(".talk-open")
    nothing_is_asked(earlier=False)
    page.wait_for_url(lambda url: "helpfulness:0.995,verbosity:0.105" in unquote(url))
    opened.follow_link("d=helpfulness:0.8,verbosity:0.6")
    nothing_is_asked(earlier=True)
    opened.follow_link("d=helpfulness:0.995,verbosity:0.105")
    nothing_is_asked(earlier=False)


def test_a_conversation_is_opened_with_the_settings_it_was_asked_with(visit):
    opened = visit().ready()
    page = opened.page
    fields = ("#seed", "#temperature", "#max-tokens")

    def set_to(*values: str) -> None:
        for field, value in zip(fields, values, strict=True):
            page.fill(field, value)

    page.click("#settings summary")
    set_to("7", "0.3", "99")
    opened.ask(IVY)
    page.click("#new")
    page.click("#settings summary")
    set_to("8", "1", "50")
    opened.open_history()
    page.click(".talk-open")
    assert [page.input_value(field) for field in fields] == ["7", "0.3", "99"]
    page.wait_for_selector("#snippet:has-text('\"seed\": 7')")
    page.evaluate(
        """() => { const [[place, kept]] = Object.entries(localStorage);
        localStorage.setItem(place, kept.replaceAll('"temperature":0.3', '"temperature":300')); }"""
    )
    opened.open_history()
    page.click(".talk-open")
    assert page.input_value("#temperature") == "2", "anybody may have written there"


def test_of_two_tabs_with_the_same_conversation_each_keeps_its_own_turns(visit):
    opened = visit().ready()
    opened.ask(IVY)
    with opened.page.expect_popup() as opening:
        opened.page.evaluate("() => { open(location.href); }")  # takes sessionStorage along, as a duplicated tab does
    other = Opened(opening.value, opened.gateway, opened.url).ready()
    assert other.text("#asked") == IVY
    opened.ask(BEE)
    other.ask("And Ida?")
    other.page.reload()
    other.ready()
    assert other.text("#asked") == "And Ida?"
    other.ask("And Ben?")
    opened.ask("And Ada?")
    kept = opened.page.evaluate("Object.values(localStorage).map((one) => JSON.parse(one))")
    questions = [[turn["question"] for turn in conversation["turns"]] for conversation in kept]
    assert sorted(questions) == [[IVY, "And Ida?", "And Ben?"], [IVY, BEE, "And Ada?"]]


def test_a_box_that_the_browser_brought_back_unticked_shows_what_holds(visit):
    boxes = ("follow", "memory", "marks")
    back = f"for (const box of {list(boxes)}) document.getElementById(box).checked = false;"
    opened = visit(script=f'document.addEventListener("DOMContentLoaded", () => {{ {back} }});').ready()
    for box in boxes:
        assert opened.page.locator(f"#{box}").evaluate("node => node.checked")


def test_what_is_being_written_is_kept_when_the_page_turns_to_something_else(visit):
    opened = visit().ready()
    page = opened.page
    opened.ask(IVY)
    page.click("#new")

    def ask_slowly() -> None:
        page.fill("#question", "slow")
        page.click("#go")
        for card in ("default", "steered"):
            page.wait_for_selector(f"#{card} .text:has-text('word2')")

    def is_kept() -> None:
        assert opened.text("#asked") == "slow"
        states = set(page.locator(".answer .state").all_inner_texts())
        assert states <= {"stopped", "broken off"}, "a reload lets the browser break it off"
        assert opened.text("#steered .text").startswith(words(3))

    ask_slowly()
    page.click("#new")
    opened.open_history()
    assert page.locator("#talks span").all_inner_texts() == ["slow", IVY]
    page.click("#talks li:first-child .talk-open")
    is_kept()

    ask_slowly()
    opened.open_history()
    page.click("#talks li:last-child .talk-open")
    assert opened.text("#asked") == IVY
    opened.open_history()
    assert page.locator("#talks small").nth(0).inner_text().startswith("2 turns")
    page.click("#talks li:first-child .talk-open")
    is_kept()

    ask_slowly()
    page.reload()
    opened.ready()
    is_kept()
    assert page.locator(".past").count() == 2

    ask_slowly()
    opened.open_history()
    page.click("#talks li:first-child >> text=Delete")
    page.reload()
    opened.ready().open_history()
    assert page.locator("#talks span").all_inner_texts() == [IVY], "what is deleted does not come back"


def test_an_answer_that_is_asked_anew_gives_its_place_up_with_its_first_word(visit):
    opened = visit().ready()
    page = opened.page
    opened.ask("twice")
    whole = opened.text("#steered .text")
    opened.press_level(1, 1)
    page.wait_for_selector("#steered[aria-busy]")
    page.reload()
    assert opened.ready().text("#steered .text") == whole


def test_of_a_conversation_too_long_to_be_read_whole_the_newest_turns_are(visit):
    opened = visit(at="/conversation.js")
    first, last = opened.page.evaluate(
        """async () => { const { readConversation } = await import("/conversation.js");
        const turns = Array.from({ length: 300 }, (_, n) => ({ question: `${n}`, answers: [{}, {}] }));
        const read = readConversation({ id: "c", turns }).turns;
        return [read[0].question, read.at(-1).question]; }"""
    )
    assert (first, last) == ("100", "299")


FORBIDDEN = """for (const name of ["localStorage", "sessionStorage"])
    Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });"""
FULL = """Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };"""


@pytest.mark.parametrize("script", [FORBIDDEN, FULL], ids=["forbidden", "full"])
def test_where_nothing_can_be_kept_the_conversation_goes_on_and_says_so(visit, script):
    opened = visit(script=script).ready()
    opened.ask(IVY)
    assert opened.page.locator("#unkept").is_visible()
    opened.open_history()
    assert opened.page.locator("#talks li").count() == 0


def test_what_others_wrote_into_the_storage_is_passed_over_and_the_oldest_give_way(visit):
    turn = {"question": "q" * 300, "answers": [{"text": "a"}, {"text": "b"}], "kept": 7, "seed": "x"}
    odd = [
        None,
        3,
        [],
        {"id": "x"},
        {"id": "y", "turns": [{}]},
        {"id": "<b>", "turns": [turn]},
        {"id": "z", "turns": [3]},
        {"id": "c1", "turns": [turn]},
        {"id": "odd8", "changed": 1e300, "turns": [turn]},
    ]
    script = f"""if (!localStorage.length) {{
        const odd = {json.dumps(odd)}, turn = {json.dumps(turn)};
        odd.forEach((value, n) => localStorage.setItem(`dpa-conversation-odd${{n}}`, JSON.stringify(value)));
        localStorage.setItem("dpa-conversation-broken", "{{");
        localStorage.setItem("somebody-elses", "stays");
        for (let n = 0; n < 60; n++)
            localStorage.setItem(`dpa-conversation-c${{n}}`,
                JSON.stringify({{ id: `c${{n}}`, changed: n, turns: [turn] }}));
    }}"""
    opened = visit(script=script).ready()
    opened.open_history()
    assert opened.page.locator("#talks li").count() == 61, "the one of a day that never comes is the oldest"
    opened.page.locator("#talks .talk-open").nth(0).click()
    assert opened.text("#steered .text") == "b"
    opened.ask(IVY)
    kept = opened.page.evaluate("Object.keys(localStorage)")
    assert len(kept) == 51 and "somebody-elses" in kept
    assert {f"dpa-conversation-c{n}" for n in range(11, 60)} < set(kept)


# --- a sweep ---


def test_a_sweep_asks_in_five_directions_and_goes_on_from_the_chosen_one(visit):
    opened = visit(THREE, reduced_motion="reduce").ready()
    page = opened.page
    page.fill("#question", IVY)
    page.click("#sweep")
    page.wait_for_selector("#cards.sweep")
    opened.finished()
    cards = page.locator("#cards .answer")
    asked = [THREE.parse(body["dpa"]) for body in opened.gateway.bodies]
    angles = sorted(float(THREE.asked_angle([one.weights], "verbosity")[0]) for one in asked)
    assert angles == pytest.approx([-45, -22.5, 0, 22.5, 45], abs=0.2)
    assert page.locator("#cards h3").all_inner_texts() == [
        "Much less verbosity",
        "Less verbosity",
        "Helpfulness first",
        "More verbosity",
        "Much more verbosity",
    ]
    counts = [int(text.split()[0]) for text in cards.locator(".count").all_inner_texts()]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert cards.locator(".by").all_inner_texts() == ["Model reward"] * 5
    tops = {round(card.bounding_box()["y"]) for card in cards.all()}
    assert len(tops) == 1, "side by side"
    assert cards.nth(0).locator(".keep").get_attribute("aria-pressed") == "true", "the one that was set"

    cards.nth(3).locator(".keep").click()
    assert opened.text("#words") == "More verbosity."
    opened.ask(BEE)
    assert opened.said()[:2] == [("user", IVY), ("assistant", words(counts[3]))]
    assert "The other 4 answers" in opened.text(".past")
    page.reload()
    opened.ready()
    opened.ask("")
    assert opened.said()[:2] == [("user", IVY), ("assistant", words(counts[3]))]


def test_a_sweep_is_stopped_and_taken_along_another_objective_or_the_presets(visit):
    opened = visit(THREE).ready()
    page = opened.page
    page.fill("#question", "slow")
    page.click("#sweep")
    for place in range(1, 6):
        page.wait_for_selector(f"#cards .answer:nth-child({place}) .text:has-text('word2')")
    page.click("#stop")
    opened.finished()
    assert page.locator("#cards .state").all_inner_texts() == ["stopped"] * 5
    page.click("#new")
    opened.ask(IVY)
    page.click("#sweep")
    opened.finished()
    assert opened.text("#asked") == IVY
    page.select_option("#along", "warmth")
    opened.finished()
    assert page.locator("#cards h3").nth(4).inner_text() == "Much more warmth"
    page.select_option("#along", "the presets")
    opened.finished()
    assert page.locator("#cards h3").all_inner_texts() == list(PRESETS)


def test_a_sweep_goes_on_from_an_answer_that_is_there_only(visit):
    opened = visit().ready()
    opened.page.fill("#question", "broken")
    opened.page.click("#sweep")
    opened.finished()
    keep = opened.page.locator("#cards .keep")
    assert keep.all_inner_texts() == ["Go on with this"] * 5
    assert [button.is_disabled() for button in keep.all()] == [True] * 5
    opened.page.fill("#question", "slow")
    opened.page.click("#sweep")
    opened.page.wait_for_selector("#cards .answer:nth-child(4) .text:has-text('word2')")
    assert keep.nth(3).is_enabled()
    opened.page.click("#stop")
    opened.finished()
    opened.page.reload()
    opened.ready()
    keep.nth(3).click()
    assert keep.nth(3).inner_text() == "Going on with this"


def test_a_sweep_reads_well_at_every_width(visit):
    opened = visit(reduced_motion="reduce").ready(finer=False)
    opened.page.fill("#question", IVY)
    opened.page.click("#sweep")
    opened.finished()
    for width, rows in ((1440, 1), (820, 2), (390, 5)):
        opened.page.set_viewport_size({"width": width, "height": 900})
        boxes = [card.bounding_box() for card in opened.page.locator("#cards .answer").all()]
        assert len({round(box["y"]) for box in boxes}) == rows
        assert min(box["width"] for box in boxes) > 190
        opened.no_sideways_scrolling()


# --- two answers ---


def test_what_differs_between_the_answers_is_marked_by_word_and_an_answer_is_copied_without(visit):
    opened = visit(permissions=["clipboard-read", "clipboard-write"]).ready()
    opened.ask(IVY)
    opened.page.click("#default .copy")
    opened.page.wait_for_selector("#default .copy:has-text('Copied')")
    assert opened.page.evaluate("navigator.clipboard.readText()") == words(20)
    assert opened.page.locator("#default .text del").all_inner_texts() == [" ".join(f"word{n}" for n in range(7, 20))]
    assert opened.page.locator("#steered .text ins").count() == 0
    assert opened.text("#default .text") == words(20)
    assert opened.text("#mark-note") == "Underlined: words the other answer lacks."
    opened.page.uncheck("#marks")
    assert opened.page.locator("#default .text *").count() == 0
    assert opened.text("#default .text") == words(20)
    opened.page.check("#marks")
    opened.page.click("#presets >> text=full")
    opened.page.wait_for_selector("#mark-note:has-text('the same, word for word')")
    opened.press_level(1, 1)
    opened.page.wait_for_selector("#steered ins:has-text('word20')")


def test_what_is_written_from_right_to_left_is_shown_so(visit):
    opened = visit().ready()
    opened.ask("שלום")

    def direction(selector: str) -> str:
        return opened.page.locator(selector).first.evaluate("node => getComputedStyle(node).direction")

    assert [direction(one) for one in ("#asked", "#steered .text", "#steered .told")] == ["rtl", "rtl", "ltr"]
    opened.page.fill("#question", "שלום")
    assert direction("#question") == "rtl"
    opened.ask(IVY)
    assert [direction(one) for one in (".past .question", ".kept-text")] == ["rtl", "rtl"]
    assert [direction(one) for one in ("#asked", "#question", "#steered .text")] == ["ltr"] * 3


def test_differences_of_words_are_a_shortest_edit_and_lose_no_character(visit):
    opened = visit(at="/words.js")
    pairs = [
        ("The cat sat on the mat.", "The black cat lay on the mat."),
        ("a b c a b b a", "c b a b a c"),
        (" two  spaces\n\nand lines ", "two spaces and\nlines"),
        ("", "all new"),
        ("same same", "same same"),
    ]
    found = opened.page.evaluate(
        """async (pairs) => { const { differences } = await import("/words.js");
        return pairs.map(([a, b]) => differences(a, b)); }""",
        pairs,
    )
    for (before, after), runs in zip(pairs, found, strict=True):
        for text, side in zip((before, after), runs, strict=True):
            assert "".join(piece for piece, _ in side) == text
        kept = [[word for piece, only in side if not only for word in piece.split()] for side in runs]
        assert kept[0] == kept[1]
    marked = [[piece for piece, only in side if only] for side in found[0]]
    assert marked == [["sat"], ["black", "lay"]]
    assert sum(len(piece.split()) for piece, only in found[1][0] if not only) == 4


# --- what is said ---


def test_a_direction_is_said_to_ask_for_no_more_than_it_asks_for(visit):
    """All else weighs less in a unit vector that asks for warmth; that is no wish for less of it."""
    presets = {"warm": {"helpfulness": 0.75, "warmth": 0.66}, "terse": {"helpfulness": 0.75, "verbosity": -0.66}}
    opened = visit(space_of("helpfulness", "verbosity", "warmth", presets=presets)).ready()
    opened.page.click("#presets >> text=warm")
    assert opened.text("#words") == "Much more warmth."
    assert opened.page.locator("#levels legend").all_inner_texts() == ["verbosity", "warmth"]
    assert opened.levels() == [0, 1]
    found = opened.page.evaluate(
        """async (cases) => { const { Space } = await import("/space.js"); return cases.map(([center, direction]) => {
            const objectives = Object.keys({ ...center, ...direction }).map((name) => ({ name }));
            const space = new Space({ objectives, center, max_angle: 45, presets: {} });
            return space.words(space.weightsOf(direction)); }); }""",
        [
            [{"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 2}],
            [{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 1}],
            [{"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 0.3}],
            [{"h": 0.82, "v": -0.57}, {"h": 0.98, "v": -0.2}],
            [{"h": 0.82, "v": -0.57}, {"h": 0.98, "v": 0.17}],
        ],
    )
    assert found == ["More c", "More a", "Less c", "More v", "Much more v"]


def test_a_model_that_was_found_not_to_follow_its_direction_is_said_to(visit):
    opened = visit(extra={"front_follows": False}).ready()
    assert opened.text("#front-note").startswith("As measured, this model does not follow its direction.")


def test_every_score_says_whose_it_is_and_a_toy_is_called_one_and_asked_each_question_by_itself(visit):
    opened = visit(extra={"front_reward": "model", "parameters": 712_000}).ready()
    assert opened.axis() == "verbosity, model reward →"
    assert "held-out questions: model reward" in opened.text("#front-note")
    assert "does not follow" not in opened.text("#front-note")
    assert "0.7 million" in opened.text("#toy")
    assert "only what the question gives it" in opened.text("#toy")
    opened.ask(IVY)
    assert opened.page.locator(".answer .by").all_inner_texts() == ["Model reward"] * 2
    opened.ask(BEE)
    assert opened.said() == [("user", BEE)]


# --- wherever it is used ---


def test_on_a_phone_the_answer_stays_in_sight_while_presets_are_tapped(visit):
    presets = {**PRESETS, "wordy": {"helpfulness": 0.75, "verbosity": 0.66}}
    opened = visit(space_of("helpfulness", "verbosity", presets=presets), reduced_motion="reduce", **PHONE).ready(False)
    opened.ask("Notes on Ivy. " * 8 + IVY)
    for preset in ("wordy", "full", "terse"):
        opened.page.tap(f"#presets >> text={preset}")
        answered_again(opened.page)
        dock = opened.page.locator("#ask").bounding_box()
        text = opened.page.locator("#steered .text").bounding_box()
        assert text["y"] >= 0, preset
        assert text["y"] + 60 < dock["y"], preset
        assert dock["y"] + dock["height"] <= 780 and dock["height"] < 200


def test_everything_is_done_by_keyboard_alone(visit):
    opened = visit(THREE, extra={"examples": [IVY]}).ready(finer=False)
    page, press = opened.page, opened.page.keyboard.press

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(40):
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
            press(key)
        raise AssertionError(f"{selector} is not reached by {key}")

    tab_to("#question")
    page.keyboard.type(IVY)
    press("Enter")
    page.wait_for_selector("#steered .count:has-text('7 words')")
    opened.finished()
    tab_to("#presets button:nth-child(2)", "Shift+Tab")
    press("Space")
    answered_again(page)
    tab_to("#sweep")
    press("Enter")
    page.wait_for_selector("#cards.sweep")
    opened.finished()
    tab_to("#cards .answer:nth-child(5) .keep")
    press("Space")
    assert opened.text("#words") == "Much more verbosity."
    tab_to("#question", "Shift+Tab")
    page.keyboard.type("slow")
    press("Enter")
    page.wait_for_selector("#steered .text:has-text('word2')")
    tab_to("#stop")
    press("Enter")
    opened.finished()
    assert page.evaluate("document.activeElement.id") == "question"
    tab_to("#history summary", "Shift+Tab")
    press("Enter")
    page.wait_for_selector("#talks li")
    tab_to(".talk-open")
    tab_to("#talks button:last-child")
    press("Enter")
    assert page.locator("#talks li").count() == 0
    press("Escape")
    assert not page.locator("#history").evaluate("node => node.open")
    assert page.locator("#welcome").is_visible()


def test_two_long_answers_stream_without_a_stutter(visit):
    """60 frames a second on a quiet machine; the bounds leave room for a busy one, the count of layouts needs none."""
    opened = visit().ready(finer=False)
    page = opened.page
    browser_side = page.context.new_cdp_session(page)
    browser_side.send("Performance.enable")

    def spent() -> dict[str, float]:
        return {one["name"]: one["value"] for one in browser_side.send("Performance.getMetrics")["metrics"]}

    page.evaluate(
        """() => { window.frames_ms = []; let last = 0;
        const frame = (now) => { if (last) frames_ms.push(now - last); last = now;
            if (!window.over) requestAnimationFrame(frame); };
        requestAnimationFrame(frame); }"""
    )
    for again in range(3):  # the machine may be busy with other things
        if again:
            page.click("#new")
        before = spent()
        page.evaluate("frames_ms.length = 0")
        page.fill("#question", "long")
        page.press("#question", "Enter")
        page.wait_for_selector("#steered .count:has-text('2000 words')", timeout=60_000)
        opened.finished()
        after = spent()
        frames = sorted(page.evaluate("frames_ms"))
        cost = {name: after[name] - before[name] for name in ("LayoutCount", "LayoutDuration", "ScriptDuration")}
        busy_ms = 1000 * (cost["LayoutDuration"] + cost["ScriptDuration"]) / len(frames)
        median, late = frames[len(frames) // 2], frames[int(0.95 * len(frames))]
        print(f"{len(frames)} frames: median {median:.1f} ms, 95th percentile {late:.1f} ms")
        print(f"work {busy_ms:.1f} ms a frame; {cost}")
        assert len(opened.text("#default .text").split()) == 2000
        assert cost["LayoutCount"] < 3 * len(frames) + 60, "laid out once a frame, not once a word"
        if median < 34 and busy_ms < 16:
            break
    page.evaluate("window.over = true")
    assert median < 34, "half the frames of a display at most are lost"
    assert busy_ms < 16
