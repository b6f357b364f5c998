"""Which model is meant: a folder or Hub id, and whether its own Python code may run.
Run its tests: pytest tests/test_remote_code.py
"""

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class ModelReference:
    """A model folder or Hub id. `code_revision`: the 40-hex commit of its own code that was opted in to; None: no code
    of its own runs, and a model that needs some is refused."""

    name: str
    code_revision: str | None = None

    @classmethod
    def of(cls, model: "Model") -> "ModelReference":
        """The same reference, or the one a bare path or Hub id stands for: without code of its own."""
        return model if isinstance(model, ModelReference) else cls(str(model))

    def absolute(self) -> "ModelReference":
        """The same folder, from wherever it is looked at."""
        return replace(self, name=str(Path(self.name).resolve()))

    def __str__(self) -> str:
        return self.name


Model = str | Path | ModelReference
"""What a function that loads a model takes."""
