"""Pushing a model folder to the Hugging Face Hub.
Run its tests: pytest tests/test_card.py
"""

from pathlib import Path
from typing import Any

from dpa.core.errors import EngineError, ModelFileError
from dpa.models.files import CONTENT_SUFFIXES, PICKLE_SUFFIXES, check_model_folder
from dpa.storage.seals import check_in_run


def push_model(folder: str | Path, hub_id: str, private: bool = True, api: Any = None) -> str:
    """Upload a checked folder (weights, configuration, tokenizer, card); return its address.

    `api`: a huggingface_hub.HfApi; by default one with the token `hf auth login` saved. Refuses a folder that holds a
    pickle, even beside safetensors: whoever downloads it may open that. Raises ModelFileError, EngineError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(folder)
    check_model_folder(folder)
    check_in_run(folder)
    pickles = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelFileError(f"push: {folder} holds a pickle ({pickles[0]}); remove it, safetensors are enough.")
    api = api or HfApi()
    patterns = [f"*{suffix}" for suffix in sorted(CONTENT_SUFFIXES)] + ["*.md"]
    try:
        repo = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=str(folder), allow_patterns=patterns, commit_message="Upload with dpa push"
        )
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
