"""Seeds of the answers to one request.
Run its tests: pytest tests/test_engine.py tests/test_gateway.py -k "seed or best_of"
"""

from dpa.core.records import seed_of


def nth_seed(seed: int, k: int) -> int:
    """The seed of the k-th answer: the first one's is the request's own. Never negative."""
    return seed % 2**64 if k == 0 else seed_of(f"{seed}-{k}")


def sendable(seed: int) -> int:
    """A seed of 64 bits as servers take it: vLLM adds the number of a choice to it, and ends where that overflows."""
    return seed if seed < 2**62 else seed % 2**62
