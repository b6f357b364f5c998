"""The judge against a server on loopback: both orders, position bias, length seen through, replay without a network.
pytest tests/test_judge.py
"""

import csv
import fcntl
import json
import re
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer, Reply
from fakes import space_of

from dpa.core.errors import ConfigError, DataError, EngineError, StorageError
from dpa.remote.judge_client import ChatJudge
from dpa.stages.judge import (
    Pair,
    count_tokens,
    judge,
    length_controlled,
    make_pairs,
    prompts_of,
    read_answers,
    read_verdict,
    sentence,
    write_verdicts,
)
from dpa.storage.replies import Replies

SPACE = space_of("helpfulness", "verbosity")
TERSE = SPACE.parse("helpfulness*0.8 - verbosity*0.6")
FULL = SPACE.parse("helpfulness*0.8 + verbosity*0.6")
_ANSWERS = re.compile(
    r"\[Answer A\]\n(.*?)\n\[End of answer A\]\n\n\[Answer B\]\n(.*?)\n\[End of answer B\]", re.DOTALL
)


def by_length(prompt: str) -> str:
    """Prefers the answer whose length the wish is for; a tie where they are as long."""
    wants_long = "verbosity: -" not in prompt
    a, b = (len(text) for text in _ANSWERS.findall(prompt)[0])
    if a == b:
        return "TIE"
    return "A" if (a > b) == wants_long else "B"


class Server(FakeServer):
    """A judge on loopback: `say` makes the reply; the first `statuses` are answered instead."""

    def __init__(self, say: Callable[[str], str]) -> None:
        super().__init__(self._reply)
        self.say = say
        self.statuses: list[tuple[int, dict[str, str]]] = []
        self.url = f"{self.address}/v1"

    def _reply(self, body: dict) -> Reply:
        status, headers = self.statuses.pop(0) if self.statuses else (200, {})
        message = {"role": "assistant", "content": self.say(body["messages"][-1]["content"])}
        usage = {"prompt_tokens": 50, "completion_tokens": 3}
        return status, {"choices": [{"index": 0, "message": message}], "usage": usage}, headers


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(by_length) as server:
        yield server


PAIRS = [Pair(f"Request {n}", "word " * (n % 5 + 3), "word " * (n % 5 + 1)) for n in range(20)]


def asker(server: Server | None, folder: Path, **options) -> ChatJudge:
    return ChatJudge([server.url] if server else [], "fake-judge", folder / "cache.jsonl", backoff_s=0.01, **options)


def test_the_judge_is_told_the_preference_and_win_rates_follow_it(server: Server, tmp_path: Path) -> None:
    for wish, expected in ((TERSE, 0.0), (FULL, 1.0)):
        found = judge(asker(server, tmp_path), PAIRS, SPACE, wish, ("long", "short"))
        assert found["win_rate"]["value"] == expected
        assert found["first_shown_wins"]["value"] == 0.5
        assert found["agreement"] == 1.0
        assert not found["position_biased"]
        assert found["longer_wins"] == expected
        assert found["characters"]["long"] > found["characters"]["short"]
    assert len(server.bodies()) == 2 * 2 * len(PAIRS)
    prompt = server.bodies()[0]["messages"][0]["content"]
    assert "- helpfulness: 80\n- verbosity: -60" in prompt


def test_a_judge_who_loves_the_first_answer_is_found_out(server: Server, tmp_path: Path) -> None:
    server.say = lambda prompt: "A"
    found = judge(asker(server, tmp_path), PAIRS, SPACE, FULL, ("x", "y"))
    assert found["win_rate"]["value"] == 0.5  # the two orders cancel
    assert found["first_shown_wins"]["value"] == 1.0
    assert found["agreement"] == 0.0
    assert found["position_biased"]
    assert "POSITION-BIASED" in sentence(found)


class Scripted:
    """A judge whose verdicts for the answer shown first are written down, two for each pair."""

    def __init__(self, first_wins: str) -> None:
        self.replies = list(first_wins)

    def ask(self, prompts: Sequence[str], progress: Callable[[int], None] = lambda count: None) -> list[str]:
        assert len(prompts) == len(self.replies)
        return self.replies


@pytest.mark.parametrize(
    ("replies", "share", "biased"),
    [
        ("AA" * 16 + "BB" * 4, 0.8, True),
        ("BB" * 16 + "AA" * 4, 0.2, True),  # whoever loves the last answer
        ("AA" * 7 + "BB" * 3, 0.7, False),  # of ten pairs that may be chance
        ("AA" * 60 + "AB" * 340, 0.575, False),  # no chance, and not much
    ],
    ids=["first", "last", "chance", "little"],
)
def test_a_judge_is_called_biased_where_it_is_much_and_beyond_chance(replies: str, share: float, biased: bool) -> None:
    pairs = PAIRS * 20
    found = judge(Scripted(replies), pairs[: len(replies) // 2], SPACE, FULL, ("x", "y"))
    assert found["first_shown_wins"]["value"] == pytest.approx(share)
    assert found["position_biased"] is biased


def test_a_pair_with_one_reply_that_is_no_verdict_is_left_out_whole() -> None:
    found = judge(Scripted("AB" + "A?" + "?B" + "BA"), PAIRS[:4], SPACE, FULL, ("x", "y"))
    assert (found["judged"], found["invalid"]) == (2, 2)
    assert found["win_rate"]["value"] == found["first_shown_wins"]["value"] == 0.5


def test_a_rerun_without_a_network_gives_the_same_table(server: Server, tmp_path: Path) -> None:
    first = judge(asker(server, tmp_path), PAIRS, SPACE, TERSE, ("x", "y"))
    with (tmp_path / "cache.jsonl").open("ab") as file:
        file.write(b'{"key": "half a l')  # the power went
    replayed = asker(None, tmp_path)
    assert replayed.missing(prompts_of(PAIRS, SPACE, TERSE)) == []
    assert judge(replayed, PAIRS, SPACE, TERSE, ("x", "y")) == first
    assert replayed.calls == 0
    with pytest.raises(EngineError, match="not in"):
        judge(replayed, PAIRS, SPACE, FULL, ("x", "y"))


def test_damaged_lines_of_the_cache_are_left_out_with_one_sentence_and_asked_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.say = lambda prompt: f"A, said of {prompt}"
    prompts = [f"prompt {n}" for n in range(6)]
    told = asker(server, tmp_path, in_flight=1).ask(prompts)
    cache = tmp_path / "cache.jsonl"
    lines = cache.read_bytes().splitlines()
    lines[0] = lines[0].replace(b"A, said", b"B, said")  # a verdict changed by hand, or by a disk
    lines[1] = b"\xff\x00" + lines[1]
    lines[2] = b"[" * 20_000
    lines[3] = json.dumps({key: value for key, value in json.loads(lines[3]).items() if key != "check"}).encode()
    cache.write_bytes(b"\n".join(lines)[:-9])
    again = asker(server, tmp_path)
    assert again.missing(prompts) == [prompts[n] for n in (0, 1, 2, 5)], "lines without a check are from an older dpa"
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache}: 4 of 6 lines are damaged and left out; what they answered is asked again."
    ]
    assert again.ask(prompts) == told
    assert (again.calls, asker(None, tmp_path).ask(prompts)) == (4, told)


def test_what_another_process_paid_for_meanwhile_is_not_paid_again(server: Server, tmp_path: Path) -> None:
    server.say = lambda prompt: f"A, said of {prompt}"
    first, second = (asker(server, tmp_path) for _ in range(2))
    told = first.ask(["one", "two"])
    assert second.ask(["two", "one"]) == told[::-1] and second.calls == 0
    second.ask(["three"])
    assert first.ask(["three", "one"])[1] == told[0] and first.calls == 2
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 3


def test_a_reply_is_added_alone_and_one_that_is_not_kept_whole_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    kept = Replies(file)
    kept.keep("a", "model", "yes")
    with file.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        adding = threading.Thread(target=kept.keep, args=("b", "model", "no"))
        adding.start()
        adding.join(0.2)
        assert adding.is_alive(), "it waits for whoever adds now"
    adding.join(10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(StorageError, match="keeping a reply failed"):
            kept.keep("c", "model", "perhaps")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept.keep("d", "model", "never")
    assert Replies(file).replies == {"a": "yes", "b": "no", "d": "never"}


def test_trouble_is_tried_again_and_refusals_are_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [(429, {"Retry-After": "0"}), (500, {}), (503, {})]
    found = judge(asker(server, tmp_path, in_flight=1, key="secret"), PAIRS[:1], SPACE, FULL, ("x", "y"))
    assert found["judged"] == 1
    assert len(server.bodies()) == 2 + 3
    assert {headers["authorization"] for headers in server.headers_seen} == {"Bearer secret"}
    server.say = lambda prompt: "A"
    server.statuses = [(401, {})]
    with pytest.raises(EngineError, match=r"401.*check DPA_JUDGE_API_KEY"):
        asker(server, tmp_path / "other", in_flight=1).ask(["x"])
    assert len(server.bodies()) == 2 + 3 + 1
    server.stop()
    gone = ChatJudge([server.url], "m", tmp_path / "third.jsonl", backoff_s=0.001)
    with pytest.raises(EngineError, match="no server answers"):
        gone.ask(["x"])
    for address in ("localhost:8000", "http://localhost:99999", "http://", "http://[::1", "http://a\x1b[2J"):
        with pytest.raises(ConfigError, match=r"^--base-url: '[ -~]*' is no address; write"):
            ChatJudge([address], "m", tmp_path / "third.jsonl")


def test_replies_that_came_before_a_failure_are_kept(server: Server, tmp_path: Path) -> None:
    server.statuses = [(200, {}), (200, {}), (401, {})]
    with pytest.raises(EngineError):
        judge(asker(server, tmp_path, in_flight=1), PAIRS, SPACE, FULL, ("x", "y"))
    before = len(server.bodies())
    judge(asker(server, tmp_path, in_flight=1), PAIRS, SPACE, FULL, ("x", "y"))
    assert len(server.bodies()) - before <= 2 * len(PAIRS) - 2


def test_length_control_sees_through_a_judge_who_counts_words() -> None:
    """First answers are longer in 80% of the pairs and length alone decides: at equal length it is a draw."""
    rng = np.random.default_rng(0)
    difference_N = np.where(rng.random(400) < 0.8, 1.0, -1.0) * rng.uniform(20, 200, 400)
    win_N = (rng.random(400) < 1 / (1 + np.exp(-difference_N / 40))).astype(float)
    assert win_N.mean() > 0.68
    assert 0.42 < length_controlled(win_N, difference_N) < 0.58
    fair_N = (rng.random(400) < 0.7).astype(float)  # better whatever the length
    assert length_controlled(fair_N, difference_N) == pytest.approx(0.7, abs=0.08)
    assert length_controlled(np.ones(10), np.zeros(10)) > 0.95


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0),
        ("**B**", 0.0),
        ("tie.", 0.5),
        ("Answer A", 1.0),
        ("Verdict: B", 0.0),
        ("A good answer would be short.\nFinal answer: B", 0.0),
        ("A\nBecause it is shorter.", 1.0),
        ("A or B, who knows", None),
        ("Both are fine", None),
        ("", None),
    ],
)
def test_verdicts(reply: str, verdict: float | None) -> None:
    assert read_verdict(reply) == verdict


def test_replies_that_are_no_verdict_are_counted_and_left_out(server: Server, tmp_path: Path) -> None:
    server.say = lambda prompt: "I would rather not" if "Request 3\n" in prompt else by_length(prompt)
    found = judge(asker(server, tmp_path), PAIRS, SPACE, FULL, ("x", "y"))
    assert (found["judged"], found["invalid"]) == (19, 1)
    server.say = lambda prompt: "no"
    with pytest.raises(DataError, match="A, B or TIE"):
        judge(asker(server, tmp_path / "other"), PAIRS, SPACE, FULL, ("x", "y"))


def test_the_estimate_counts_calls_and_tokens_before_anything_is_asked() -> None:
    prompts = prompts_of(PAIRS, SPACE, FULL)
    found = count_tokens(prompts)
    assert found.calls == 40
    assert found.tokens_in == round(sum(map(len, prompts)) / 4)
    assert (found.tokens_out, found.longest) == (40 * 4, False)
    reasons = count_tokens(prompts, max_tokens=4000)
    assert (reasons.tokens_out, reasons.longest) == (40 * 4000, True)


def test_the_page_shows_answers_side_by_side_and_runs_nothing(server: Server, tmp_path: Path) -> None:
    pairs = [Pair("<script>alert(1)</script>", "yes yes", "<img onerror=x>"), *PAIRS]
    found = judge(asker(server, tmp_path), pairs, SPACE, TERSE, ("x", "y"))
    page = write_verdicts(tmp_path / "out", [found]).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "yes yes" in page
    assert (tmp_path / "out" / "judge.csv").read_text().count("helpfulness*80") == len(pairs)
    assert json.loads((tmp_path / "out" / "judge.json").read_text())[0]["win_rate"] == found["win_rate"]


def test_a_spreadsheet_takes_no_answer_for_a_formula(server: Server, tmp_path: Path) -> None:
    found = judge(asker(server, tmp_path), [Pair('=HYPERLINK("http://x")', "-1", "@SUM(A1)")], SPACE, TERSE, ("x", "y"))
    write_verdicts(tmp_path / "out", [found])
    with (tmp_path / "out" / "judge.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row[name] for name in ("request", "first", "second")] == ['\'=HYPERLINK("http://x")', "'-1", "'@SUM(A1)"]


def test_answer_files_of_both_forms_are_read(tmp_path: Path) -> None:
    rows = [{"instruction": "Do", "output": "one"}, {"instruction": "Do", "output": "two"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    hard = {
        "uid": "u",
        "messages": [{"role": "user", "content": "Do"}, {"role": "assistant", "content": {"answer": "x"}}],
    }
    (tmp_path / "b.jsonl").write_text(json.dumps(hard) + "\n")
    name, first = read_answers(tmp_path / "a.json")
    assert (name, list(first.values())) == ("a", ["one", "two"])
    assert make_pairs(first, read_answers(tmp_path / "b.jsonl")[1]) == [Pair("Do", "one", "x")]
    (tmp_path / "again.JSON").write_text(json.dumps(rows))
    twice = make_pairs(first, read_answers(tmp_path / "again.JSON")[1])
    assert twice == [Pair("Do", "one", "one"), Pair("Do", "two", "two")], "the judge reads the request as it is"
    with pytest.raises(DataError, match="no common request"):
        make_pairs({("a", 1): "b"}, {("c", 1): "d"})
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError):
        make_pairs(read_answers(tmp_path / "c.json")[1], first)
    (tmp_path / "d.json").write_text('[{"a": 1}]')
    with pytest.raises(DataError, match=r"KeyError: 'instruction'.*dpa export"):
        read_answers(tmp_path / "d.json")
