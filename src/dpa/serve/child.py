"""The first lines of an engine process: it leaves with its parent from its first moment, while torch still loads.
Run its tests: pytest tests/test_supervisor.py
"""

import os
import sys
import threading


def leave_with_parent() -> None:
    """Standard input is a pipe whose other end the parent holds: it ends with the parent, kill -9 included."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held while the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    leave_with_parent()
    from dpa.serve.engine import main

    main(sys.argv[1:])
