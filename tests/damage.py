"""Ways in which a file comes to harm. Used by: pytest tests/test_faults_storage.py tests/test_faults_run_folder.py"""

import json
from pathlib import Path

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
