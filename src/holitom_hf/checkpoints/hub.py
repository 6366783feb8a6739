"""Where a checkpoint is, without waiting for a Hub that does not answer, and without torch and transformers."""

import json
import threading
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError


CONFIG_NAME = "config.json"
# How long the Hub may take to say whether it is there.
SECONDS = 3.0


def hub_options(checkpoint: str) -> dict:
    """
    Options for every `from_pretrained` of a checkpoint: to look into the cache alone if the Hub does not answer, which
    is asked once.

    Args:
        checkpoint: Folder or Hub repository. For one without weights, its base model's Hub counts as well.

    Raises:
        OSError: If there is no such folder or repository, or the Hub does not answer and the cache does not have it.
        ValueError: If its `config.json` is none.
    """
    options = _options(checkpoint)
    base = _base_of(checkpoint, options)
    try:
        return options | (_options(base) if base else {})
    except OSError as error:
        raise OSError(f"{checkpoint} takes its weights from {base!r}, and {error}") from error


def _options(checkpoint: str) -> dict:
    if Path(checkpoint).is_dir():
        return {}
    if Path(checkpoint).is_file():
        raise NotADirectoryError(f"{checkpoint} is a file: a model is a folder, or a repository on the Hub")
    cause = _failure_of(checkpoint, CONFIG_NAME)
    if isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
        raise OSError(
            f"there is no folder {checkpoint} here and no such repository on the Hub; if it is private or gated, "
            "log in with `hf auth login`"
        ) from cause
    # Whatever else it answers, loading will tell.
    if cause is None or (isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500):
        return {}
    if not isinstance(try_to_load_from_cache(checkpoint, CONFIG_NAME), str):
        raise OSError(
            f"the Hub does not answer ({cause}), and {checkpoint} is not in the local cache: go online once, or pass "
            "a local folder"
        ) from cause
    return {"local_files_only": True}


def check_dataset(name: str) -> None:
    """
    Raises an `OSError` if the Hub, asked once, does not answer or has no such dataset. It is not asked where
    `HF_HUB_OFFLINE` says so, and datasets come from the cache.
    """
    if is_offline_mode():
        return
    cause = _failure_of(name, ".gitattributes", repo_type="dataset")
    if isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
        raise OSError(f"there is no folder and no file {name!r} here, and no such dataset on the Hub") from cause
    if cause is not None and not isinstance(cause, HfHubHTTPError):
        raise OSError(
            f"there is no folder and no file {name!r} here, and the Hub does not answer ({cause})"
        ) from cause


def _failure_of(repository: str, file: str, repo_type: str | None = None) -> Exception | None:
    """What keeps the Hub from telling of a file; `None` if it does."""
    failure: list[Exception | None] = []

    def ask():
        try:
            get_hf_file_metadata(hf_hub_url(repository, file, repo_type=repo_type), timeout=SECONDS)
            failure.append(None)
        except Exception as error:  # the HTTP library behind huggingface_hub, and its errors, differ by version
            failure.append(error)

    # In a thread: looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS + 0.5)
    return failure[0] if failure else TimeoutError("no answer")


def _base_of(checkpoint: str, options: dict) -> str | None:
    """The base model of a checkpoint without weights."""
    try:
        is_folder = Path(checkpoint).is_dir()
        file = Path(checkpoint, CONFIG_NAME) if is_folder else hf_hub_download(checkpoint, CONFIG_NAME, **options)
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise OSError(f"{checkpoint} has no {CONFIG_NAME}: it is no checkpoint") from error
    except (UnicodeDecodeError, json.JSONDecodeError):
        values = None
    if not isinstance(values, dict):
        why = " (a save into it was broken off: save again)" if any(Path(checkpoint).glob(".saving.*")) else ""
        raise ValueError(f"{CONFIG_NAME} of {checkpoint} must hold one JSON object{why}")
    settings = values.get("holitom_config")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"holitom_config in {CONFIG_NAME} of {checkpoint} must be an object, got {settings!r}")
    return (settings or {}).get("base_model_name_or_path")
