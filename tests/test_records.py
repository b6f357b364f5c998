"""Digests of what travels through the loop. pytest tests/test_records.py"""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from dpa.core.records import stable_hash

PARTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=9
)


@given(st.lists(PARTS))
def test_a_digest_is_that_of_the_parts_text_however_long_a_list_is(parts: list[object]) -> None:
    """Checkpoints and shards are recognised by it: lists are read a member at a time, with the same digest."""
    for those in (parts, [*parts, [*parts, 0] * 1001, "end"]):
        text = "\x1f".join(str(part) for part in those)
        assert stable_hash(*those) == hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
