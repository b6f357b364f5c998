"""What ends with its `with` block.
Run its tests: pytest tests/test_http_pool.py tests/test_run_folder.py
"""

from typing import Self


class Closing:
    """A class with a `close`, which the end of a `with` block calls however it ends."""

    def close(self) -> None:
        """End what outlives a call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
