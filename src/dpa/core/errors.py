"""The errors a user can meet.

Every message is one sentence that names the field, the value and the fix; the command line prints it without a
traceback and exits with the class's `exit_code`. Programmers' mistakes stay assertions and ValueErrors.

    DpaError                    1   the work could not be finished
    ├── UserError               2   something the user gave is wrong; nothing was lost
    │   ├── ConfigError             a configuration file or flag
    │   ├── DirectionError          a direction, objective or preset
    │   ├── DataError               rated rows, prompts or a table
    │   ├── ModelFileError          a model folder that is unsafe, incomplete or of the wrong kind
    │   └── RunFolderError          a run folder that belongs to another run, is locked or cannot be written
    ├── StorageError            1   the disk failed or is full
    │   └── DamageError             a file was read, and is not what was written
    ├── RejectRateError         1   more rows were rejected than `max_reject_rate` allows
    ├── EngineError             1   a sampler or scorer failed beyond its retries
    ├── TrainingError           1   training diverged (NaN or infinite loss), or gave nothing better than a mean
    └── Interrupted           130   the user or the system asked to stop; the same command resumes
"""


class DpaError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UserError(DpaError):
    """Something the user gave is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file or a flag is wrong."""


class DirectionError(UserError):
    """A direction cannot be read, is zero or not finite, names an unknown objective, or lies outside the cone."""


class OutsideConeError(DirectionError):
    """A direction lies outside the cone. `finding` says where; `remedy` what can be done besides asking within it."""

    def __init__(self, finding: str, remedy: str = "have it clamped") -> None:
        super().__init__(finding, remedy)
        self.finding = finding

    def __str__(self) -> str:
        """The sentence."""
        return f"{self.args[0]}, so ask within that or {self.args[1]}."


class DataError(UserError):
    """Rated rows, prompts or a table cannot be used."""


class ModelFileError(UserError):
    """A model folder is unsafe to load, incomplete, or of the wrong kind."""


class RunFolderError(UserError):
    """A run folder is locked, belongs to another configuration, or cannot be written."""


class StorageError(DpaError):
    """The disk refused a read or a write; the message has the path and the bytes."""


class DamageError(StorageError):
    """A file was read and is not what was written, so that it can be made again; a read that fails proves nothing."""


class RejectRateError(DpaError):
    """Too many rows were rejected; the message counts them by reason."""


class EngineError(DpaError):
    """A sampler or scorer failed beyond its retries."""


class TrainingError(DpaError):
    """Training stopped before a bad optimizer step, earlier checkpoints are kept; or what it gave is of no use."""


class Interrupted(DpaError):
    """Work stopped on a signal; what is finished is kept."""

    exit_code = 130
