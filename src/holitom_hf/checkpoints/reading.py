"""What a checkpoint must be to be used: there, whole, and found without waiting for a Hub that does not answer."""

import os
import threading

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint import base_model_of


# How long the Hub may take to say whether it is there.
SECONDS = 3.0


def hub_options(checkpoint: str) -> dict:
    """
    Options for every `from_pretrained` of a checkpoint: to look into the cache alone if the Hub does not answer, which
    is asked once.

    Args:
        checkpoint: Folder or Hub repository. For one without weights, its base model's Hub counts as well.

    Raises:
        OSError: If the Hub does not answer and the cache does not have it.
        ValueError, TypeError: If its `config.json` is none.
    """
    options = _options(checkpoint)
    _check_config(checkpoint, options)
    base, _ = base_model_of(checkpoint, options)
    return options | (_options(base) if base else {})


def load_whole(model_class: type[PreTrainedModel], checkpoint: str, **kwargs) -> PreTrainedModel:
    """
    `model_class.from_pretrained(checkpoint, **kwargs)` that refuses what upstream fills with random weights.

    Raises:
        OSError: If weights are missing or of another shape, or their file is cut off or damaged.
    """
    try:
        model, report = model_class.from_pretrained(
            checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise OSError(f"a .safetensors file is cut off or damaged ({error}): download or copy it again") from error
    names = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise OSError(f"weights are missing or of another shape, and would be random: {', '.join(names[:3])}{more}")
    return model


def _options(checkpoint: str) -> dict:
    if os.path.isdir(checkpoint):
        return {}
    failure: list[Exception | None] = []

    def ask():
        try:
            get_hf_file_metadata(hf_hub_url(checkpoint, "config.json"), timeout=SECONDS)
            failure.append(None)
        except HfHubHTTPError as error:
            # Whatever else it answers, loading will tell.
            failure.append(error if error.response.status_code >= 500 else None)
        except HFValidationError:  # no name of a repository: loading will tell
            failure.append(None)
        except Exception as error:  # the HTTP library behind huggingface_hub, and its errors, differ by version
            failure.append(error)

    # In a thread: looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS + 0.5)
    cause = failure[0] if failure else TimeoutError("no answer")
    if cause is None:
        return {}
    if not isinstance(try_to_load_from_cache(checkpoint, "config.json"), str):
        raise OSError(
            f"the Hub does not answer ({cause}), and {checkpoint} is not in the local cache: go online once, or pass "
            "a local folder"
        ) from cause
    return {"local_files_only": True}


def _check_config(checkpoint: str, options: dict) -> None:
    try:
        values, _ = PreTrainedConfig.get_config_dict(checkpoint, **options)
    except (TypeError, AttributeError):  # upstream's words for JSON that is no object
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"config.json of {checkpoint} must hold one JSON object")
    settings = values.get("holitom_config")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"holitom_config in config.json of {checkpoint} must be an object, got {settings!r}")
