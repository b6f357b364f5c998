"""Seeds of the answers to one request."""

from dpa.core.records import seed_of


def nth_seed(seed: int, k: int) -> int:
    """The seed of the k-th answer: the first one's is the request's own. Never negative."""
    return seed % 2**64 if k == 0 else seed_of(f"{seed}-{k}")
