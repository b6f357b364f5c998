"""Sequences that begin alike: who is read behind whom, and the row they make.
Run: pytest tests/test_shared_prefixes.py
"""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from dpa.models.attention import packed_attention
from dpa.models.shared_prefixes import (
    WORTH_SHARING,
    Family,
    families,
    group_families,
    pack_families,
    tokens_read,
)

HEADER = [1, 2]


def asked(question: int, length: int, endings: int) -> list[list[int]]:
    """One question of `length` tokens behind a header that all questions have, under so many endings of 3 tokens."""
    return [[*HEADER, *[question] * (length - 2), 90 + ending, 80, 81] for ending in range(endings)]


def test_questions_under_several_endings_are_a_family_each() -> None:
    first, second, alone = asked(5, 20, 4), asked(6, 30, 3), asked(7, 25, 1)
    ids_N = [first[0], second[0], alone[0], *first[1:], *second[1:]]
    assert families(ids_N) == [Family(20, (0, 3, 4, 5)), Family(30, (1, 6, 7)), Family(0, (2,))]
    assert tokens_read(ids_N, families(ids_N)) == 20 + 4 * 3 + 30 + 3 * 3 + 28


def test_a_header_that_all_begin_with_is_not_worth_it() -> None:
    """A question alone, first in order, must not draw those after it into a family of the header."""
    ids_N = [*asked(5, 20, 1), *asked(6, 20, 9)]
    assert families(ids_N) == [Family(0, (0,)), Family(20, tuple(range(1, 10)))]
    apart = [asked(question, 20, 1)[0] for question in range(5, 9)]
    assert families(apart) == [Family(0, (place,)) for place in range(4)]


def test_a_long_header_is_shared_by_all_that_have_it_though_two_alone_would_save_little() -> None:
    rng = np.random.default_rng(0)
    ids_N = [[*range(100, 200), *rng.integers(300, 900, 110).tolist()] for _ in range(50)]
    assert families(ids_N) == [Family(100, tuple(range(50)))]


def test_a_text_under_many_questions_is_shared_where_that_saves_more_than_the_questions() -> None:
    text = list(range(100, 140))
    few = [[*text, 50 + question, 60, 70 + ending] for question in range(4) for ending in range(2)]
    assert families(few) == [Family(40, tuple(range(8)))]
    many = [[*text, *[50 + question] * 20, 70 + ending] for question in range(2) for ending in range(9)]
    assert families(many) == [Family(60, tuple(range(9))), Family(60, tuple(range(9, 18)))]


def test_equal_sequences_and_beginnings_of_others_keep_a_token_of_their_own() -> None:
    assert families([[1, 2, 3]] * 3) == [Family(2, (0, 1, 2))]
    assert families([[1, 2, 3], [1, 2, 3, 4, 5]]) == [Family(2, (0, 1))]
    assert families([[1], [1], [2, 3]]) == [Family(0, (0,)), Family(0, (1,)), Family(0, (2,))]
    assert families([]) == []


def test_sequences_that_belong_together_share_what_all_of_them_begin_with() -> None:
    """Two questions on one text, each before two endings: its own would save more, and the text saves most."""
    text = list(range(100, 200))
    groups = [[[*text, *question, side] for side in (1, 2)] for question in ([5] * 10, [6] * 10)]
    assert group_families(groups) == [Family(100, (0, 1))]
    assert group_families(groups[:1]) == [Family(110, (0,))]
    assert group_families(groups, answers_N=[8, 8], capacity=176) == [Family(100, (0, 1))]
    assert group_families(groups, answers_N=[8, 8], capacity=175) == [Family(110, (0,)), Family(110, (1,))]
    assert group_families(groups, least=101) == [Family(110, (0,)), Family(110, (1,))]
    assert group_families(groups, least=111) == [Family(0, (0,)), Family(0, (1,))]


def test_no_family_exceeds_the_capacity_and_its_parts_share_what_they_have_in_common() -> None:
    """Whatever the order in which they are given, so that tokens can be counted beforehand."""
    text = list(range(100, 200))
    ids_N = [[*text, *[question] * 10, ending] for question in range(4) for ending in range(5)]
    ids_N = [*(ids_N[place] for place in np.random.default_rng(0).permutation(20)), list(range(300, 600))]
    found = families(ids_N, capacity=118)
    assert [(family.shared, len(family.places)) for family in found] == [*[(110, 5)] * 4, (0, 1)]
    for family in found[:4]:
        assert len({ids_N[place][105] for place in family.places}) == 1
    assert tokens_read(ids_N, found) == tokens_read(ids_N[::-1], families(ids_N[::-1], capacity=118))


GROUPS = st.lists(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=7), min_size=1, max_size=3), max_size=9)


@given(GROUPS, st.integers(1, 60), st.sampled_from([0, 10, 30]))
def test_every_item_is_in_one_family_that_begins_alike_and_reads_less(
    endings: list[list[list[int]]], capacity: int, text: int
) -> None:
    groups = [[[9] * text + ids for ids in group] for group in endings]
    found = group_families(groups, capacity=capacity)
    assert sorted(chain.from_iterable(places for _, places in found)) == list(range(len(groups)))
    for shared, places in found:
        members = [ids for place in places for ids in groups[place]]
        read = tokens_read(members, [Family(shared, tuple(range(len(members))))])
        assert len({tuple(ids[:shared]) for ids in members}) == 1 and shared < min(map(len, members))
        assert not shared or shared >= (1 - WORTH_SHARING) * np.mean([len(ids) for ids in members])
        assert len(places) == 1 or (shared > 0 and read <= capacity)


@given(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=7), min_size=1, max_size=8))
def test_the_row_of_families_holds_every_sequence_at_its_positions(ids_N: list[list[int]]) -> None:
    found = families(ids_N)
    inputs, places_N = pack_families(ids_N, found)
    row_T, positions_T = inputs["input_ids"][0], inputs["position_ids"][0]
    assert len(row_T) == tokens_read(ids_N, found)
    assert [row_T[places].tolist() for places in places_N] == ids_N
    assert all(positions_T[places].tolist() == list(range(len(places))) for places in places_N)


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("mistral", {"sliding_window": 9})])
def test_a_packed_family_says_what_each_of_its_sequences_says_alone(architecture: str, changes: dict) -> None:
    model, ids_N = tiny_model(architecture, **changes), [*asked(5, 20, 4), *asked(6, 12, 1), [9, 9, 9]]
    inputs, places_N = pack_families(ids_N, families(ids_N))
    with torch.inference_mode(), packed_attention(model):
        hidden_TH = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    for ids, places in zip(ids_N, places_N, strict=True):
        alone = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(hidden_TH[places], alone, rtol=1e-4, atol=1e-4)
