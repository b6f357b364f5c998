"""What token sequences begin with is found, and worth reading once. pytest tests/test_shared_prefixes.py"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpa.models.shared_prefixes import LEAST_SHARED, WORTH_SHARING, Family, families

Items = list[list[list[int]]]


def tokens(found: list[Family], items: Items) -> int:
    """That are read."""
    total = 0
    for shared, places in found:
        lengths = [len(ids) for place in places for ids in items[place]]
        total += sum(lengths) - (len(lengths) - 1) * shared
    return total


def test_a_question_under_several_directions_is_read_once() -> None:
    one, other = list(range(100, 200)), list(range(300, 400))
    items = [[[*one, 1]], [[*other, 1]], [[*one, 2, 3]], [[*other, 2]], [[7] * 20]]
    assert families(items) == [Family(100, [0, 2]), Family(100, [1, 3]), Family(0, [4])]


def test_questions_on_one_text_share_the_text() -> None:
    """Though each would share more with itself: its own prompt and that of its negative."""
    text = list(range(100, 200))
    items = [[[*text, *question, side] for side in (1, 2)] for question in ([5] * 10, [6] * 10)]
    assert families(items) == [Family(100, [0, 1])]
    assert families(items[:1]) == [Family(110, [0])]
    assert families(items, capacity=144) == [Family(100, [0, 1])]
    assert families(items, capacity=143) == [Family(110, [0]), Family(110, [1])]
    assert families(items, answers_N=[8, 8], capacity=176) == [Family(100, [0, 1])]
    assert families(items, answers_N=[8, 8], capacity=175) == [Family(110, [0]), Family(110, [1])]


def test_what_is_cut_for_room_keeps_the_order_it_was_given_in() -> None:
    """Alphabetical neighbours in one row would be directions of one kind."""
    drawn = np.random.default_rng(0).permutation(20).tolist()
    found = families([[[*range(100, 200), number]] for number in drawn], capacity=105)
    assert [family.places for family in found] == [list(range(start, start + 5)) for start in range(0, 20, 5)]


def test_the_same_prompt_twice_leaves_each_its_last_token() -> None:
    prompt = list(range(80))
    assert families([[prompt], [prompt]]) == [Family(79, [0, 1])]
    assert families([[prompt], [[*prompt, 5]]]) == [Family(79, [0, 1])]


def test_a_short_beginning_is_not_worth_it() -> None:
    rng = np.random.default_rng(0)
    items = [[[*range(70), *rng.integers(100, 999, 300).tolist()]] for _ in range(9)]
    assert families(items) == [Family(0, [place]) for place in range(9)]
    prompt = list(range(LEAST_SHARED))
    assert families([[prompt], [prompt]]) == [Family(0, [0]), Family(0, [1])]


ITEM = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=3)


@given(st.lists(ITEM, max_size=20), st.integers(20, 400), st.sampled_from([0, 60, 100]))
def test_every_item_is_in_one_family_that_begins_alike_and_reads_less(endings: Items, capacity: int, text: int) -> None:
    items = [[[9] * text + ids for ids in item] for item in endings]
    found = families(items, capacity=capacity)
    assert sorted(place for family in found for place in family.places) == list(range(len(items)))
    for family in found:
        sequences = [ids for place in family.places for ids in items[place]]
        assert len({tuple(ids[: family.shared]) for ids in sequences}) == 1
        assert family.shared == 0 or all(len(ids) > family.shared >= LEAST_SHARED for ids in sequences)
        alone, read = sum(map(len, sequences)), tokens([family], items)
        assert read <= (WORTH_SHARING * alone if family.shared else alone)
        assert len(family.places) == 1 or read <= capacity
    if text >= 100 and capacity == 400:
        assert tokens(found, items) <= sum(len(ids) for item in items for ids in item)
