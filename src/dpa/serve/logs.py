"""The log of the gateway and its engine: one JSON object a line, without any text of users.
Run its tests: pytest tests/test_gateway.py
"""

import json
import logging
import sys
import time
import traceback


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the record's `facts`. No text of users is ever in them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["failure"] = places(record.exc_info[1])
        return json.dumps(line)


def log_json() -> None:
    """Send this process's log, and uvicorn's, to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("dpa").setLevel(logging.INFO)


def places(error: BaseException) -> str:
    """Kind and place of a failure: its words might hold a user's."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return f"{type(error).__name__}: " + " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
