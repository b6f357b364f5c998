"""`dpa`, which is also `python -m dpa`. Nothing heavy is imported before a command needs it."""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpa.core.errors import DpaError

_UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)
"""What is wrong with a path that the system does not even look at: that of a mistake of ours would be looked at."""


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, never a traceback."""
    _choose_how_threads_wait()
    from dpa.cli.commands import app
    from dpa.core.errors import DpaError, Interrupted
    from dpa.storage.stopping import end_process, end_process_by_error

    code: int | str | None = 0
    try:
        app()
    except DpaError as error:
        code = _told(error)
    except OSError as error:
        if error.errno not in _UNREACHABLE or not isinstance(error.filename, str | bytes):
            end_process_by_error()
        from dpa.storage.tables import disk_error

        code = _told(disk_error(error, Path(os.fsdecode(error.filename)), "reading"))
    except KeyboardInterrupt:
        print("dpa: interrupted; a run is resumed by the same command.", file=sys.stderr)
        code = Interrupted.exit_code
    except SystemExit as left:
        code = left.code
    except BaseException:
        end_process_by_error()
    end_process(code)


def _told(error: "DpaError") -> int:
    """Say it; the exit code."""
    from dpa.core.direction_text import printable

    print("dpa:", printable(str(error), kept="\n"), file=sys.stderr)
    return error.exit_code


def _choose_how_threads_wait() -> None:
    """Before torch is loaded, which reads it: threads that spin while they wait for each other are faster on a quiet
    machine and starve each other beside other work (docs/findings.md)."""
    if _busy():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    else:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # where it gets busy later, the loss is bounded


def _busy() -> bool:
    """Whether others take half of the cores: over the last minute, and still, since that minute may have been the
    command before this one."""
    cores = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and os.getloadavg()[0] < cores / 2:
        return False
    import psutil

    return psutil.cpu_percent(0.2) >= 50


if __name__ == "__main__":
    main()
