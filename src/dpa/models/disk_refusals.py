"""What a full or failing disk says through the libraries that write models and checkpoints.
Run its tests: pytest tests/test_faults_training.py
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpa.storage.tables import disk_error


@contextmanager
def disk_refusals(path: Path, doing: str) -> Iterator[None]:
    """A disk that is full or fails is a StorageError (or RunFolderError), through whichever library the write went.

    safetensors wraps the system's error in one of its own, and torch.save says no more than that it did not get on.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, doing) from None
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise disk_error(OSError(number, os.strerror(number)), path, doing) from None
    except RuntimeError as error:
        if not any(text in str(error) for text in ("PytorchStreamWriter", "inline_container", "unexpected pos")):
            raise
        raise disk_error(OSError(errno.ENOSPC, "the file could not be written"), path, doing) from None
