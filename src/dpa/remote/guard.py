"""Runs one command and ends it, with everything it started, when this process's standard input closes.
Run its tests: pytest tests/test_server_process.py

    python guard.py GRACE_S COMMAND ...

The one who started it holds the other end of standard input: however that one ends, kill -9 included, the pipe closes
and no server is left behind. A script of its own, without the package's imports, so that it starts at once.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import psutil

_ending = threading.RLock()


def end(child: subprocess.Popen, grace_s: float) -> None:
    """Ask the child and its descendants to end; kill those that are left after `grace_s` seconds."""
    with _ending:
        family = []
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(child.pid)
            family = [leader, *leader.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(family, timeout=grace_s)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(OSError):  # and those whose parents are gone
            os.killpg(child.pid, signal.SIGKILL)


def main() -> int:
    """Returns the command's exit code (128 + n for signal n, as a shell does)."""
    grace_s = float(sys.argv[1])
    child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)

    def on_signal(number: int, frame: FrameType | None) -> None:
        end(child, grace_s)

    def on_hang_up() -> None:
        while os.read(0, 4096):
            pass
        end(child, grace_s)

    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=on_hang_up, daemon=True).start()
    code = child.wait()
    end(child, 0)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
