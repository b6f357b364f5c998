"""Pushing a model folder to the Hugging Face Hub.
Run its tests: pytest tests/test_card.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpa.core.errors import EngineError, ModelFileError
from dpa.models.files import (
    CONTENT_SUFFIXES,
    EVALUATION_FILE,
    PICKLE_SUFFIXES,
    REWARD_FILE,
    SPACE_FILE,
    check_model_folder,
)
from dpa.storage.rows import public_name
from dpa.storage.seals import check_in_run
from dpa.storage.tables import read_json, write_json

CARD = "README.md"


def push_model(folder: str | Path, hub_id: str, private: bool = True, api: Any = None) -> str:
    """Upload a checked folder (weights, configuration, tokenizer, card); return its address.

    Subfolders stay here, and so does what is nobody else's: local paths in our own records, held-out prompts. `api`: a
    huggingface_hub.HfApi; by default one with the token `hf auth login` saved. Refuses a folder that holds a pickle,
    even beside safetensors: whoever downloads it may open that. Raises ModelFileError, EngineError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(folder)
    check_model_folder(folder, allow_remote_code=True)  # which is uploaded, and not run
    check_in_run(folder)
    pickles = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelFileError(f"push: {folder} holds a pickle ({pickles[0]}); remove it, safetensors are enough.")
    api = api or HfApi()
    try:
        with TemporaryDirectory() as staged:
            _stage(folder, Path(staged))
            repo = api.create_repo(hub_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=hub_id, folder_path=staged, commit_message="Upload with dpa push")
    except OfflineModeIsEnabled:
        raise EngineError("push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.") from None
    except HFValidationError as error:
        raise ModelFileError(
            f"push: {hub_id!r} is no Hub id ({' '.join(str(error).split())}); write owner/name."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        hint = "run `hf auth login` with a token that may write" if status in (401, 403) else "try again later"
        raise EngineError(f"push: the Hub refused {hub_id} ({status}); {hint}.") from None
    except Exception as error:  # no network, time-out
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise EngineError(f"push: the Hub cannot be reached ({type(error).__name__}); check the network.") from None
    return str(repo)


def holds_rated_row(folder: str | Path) -> bool:
    """Whether a folder's record has one rated conversation in it, by which a reward model tests itself."""
    file = Path(folder) / REWARD_FILE
    record = read_json(file) if file.is_file() else None
    return isinstance(record, dict) and bool(record.get("golden"))


def _stage(folder: Path, staged: Path) -> None:
    """What is uploaded: links to the folder's own files, and our records as others may read them."""
    for file in sorted(folder.iterdir()):
        if not file.is_file() or (file.suffix not in CONTENT_SUFFIXES and file.name != CARD):
            continue
        if file.name in _PUBLIC and isinstance(record := read_json(file), dict):
            _PUBLIC[file.name](record)
            write_json(staged / file.name, record)
        else:
            (staged / file.name).symlink_to(file.resolve())


def _public_space(record: dict[str, Any]) -> None:
    about = record.get("provenance")
    _rename(about, "from")
    elsewhere = about.get("trained_elsewhere") if isinstance(about, dict) else None
    if isinstance(elsewhere, dict):
        for field in ("folder", "notes"):
            elsewhere.pop(field, None)


def _public_evaluation(record: dict[str, Any]) -> None:
    record.pop("examples", None)  # the first held-out prompts


def _public_reward(record: dict[str, Any]) -> None:
    _rename(record.get("training"), "backbone")
    _rename(record.get("folded"), "from")


def _rename(about: Any, field: str) -> None:
    """A model by what others call it, not by where it lies here."""
    if isinstance(about, dict) and isinstance(about.get(field), str):
        about[field] = public_name(about[field])


_PUBLIC = {SPACE_FILE: _public_space, EVALUATION_FILE: _public_evaluation, REWARD_FILE: _public_reward}
