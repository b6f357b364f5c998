"""Ways in which a file comes to harm, and reads that fail for a moment. Used by: pytest tests/test_faults_*.py"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAYS = ("deleted", "truncated", "{}", "[]", "a flipped bit", "a misspelt key")


def damage(file: Path, way: str) -> bool:
    """Harm a file; False where this way does not apply to it."""
    data = file.read_bytes()
    match way:
        case "deleted":
            file.unlink()
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case "a flipped bit":
            place = len(data) // 2
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        case "a misspelt key":
            if file.suffix != ".json":
                return False
            first, *rest = json.loads(data).items()
            file.write_text(json.dumps({first[0][:-1]: first[1], **dict(rest)}))
        case _:
            file.write_text(way)
    return True


@contextmanager
def failing_reads(*files: Path) -> Iterator[None]:
    """While the block runs, the disk gives an error where one of these files is read."""

    def failing(whole: Callable) -> Callable:
        def read(path: Path, *arguments: Any, **options: Any) -> Any:
            if path in files:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return whole(path, *arguments, **options)

        return read

    with pytest.MonkeyPatch.context() as disk:
        for method in ("open", "read_bytes", "read_text"):
            disk.setattr(Path, method, failing(getattr(Path, method)))
        yield
