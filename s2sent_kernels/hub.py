"""What every load of an encoder has in common: no code of the model's is run, and a hub that does not answer is asked once."""

from __future__ import annotations

import os
import time
from typing import Any

from .files import first_line, require

# Unset, transformers asks on a terminal and reads the answer from standard input, where texts may be.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
SILENT_FOR = 60.0  # seconds in which a hub that did not answer is not asked again
_silent: dict[str, tuple[float, Exception]] = {}  # by endpoint: when it did not answer, and how


def _library(module: str = "huggingface_hub") -> Any:
    return require(module, "huggingface_hub", "transformers")


def is_asked(path: str) -> bool:
    """Whether an encoder's path, as ``loading.find_model`` gives it, is the id of a hub that is asked over a network."""
    return not os.path.isdir(path) and not _library("huggingface_hub.constants").HF_HUB_OFFLINE


def reached(path: str) -> str:
    """``path``, if it is a folder or its hub answers; else the folder where it is cached.

    The hub is asked once in SILENT_FOR, for as long as HF_HUB_ETAG_TIMEOUT says. Loaders that are given an id try for half a
    minute, for each file anew, before they take what is cached.

    Raises:
        ValueError: the hub does not answer, and nothing is cached.
    """
    if not is_asked(path):
        return path
    constants, errors = _library("huggingface_hub.constants"), _library("huggingface_hub.errors")
    try:
        since, error = _silent.get(constants.ENDPOINT, (-SILENT_FOR, None))
        if error is not None and time.monotonic() < since + SILENT_FOR:
            raise error
        _library().HfApi().model_info(path, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return path
    except (errors.HfHubHTTPError, ValueError):  # it answers, or the id is none: the loaders word it
        return path
    except Exception as error:  # of the library's HTTP client, another one in each of its releases
        if error is not _silent.get(constants.ENDPOINT, (0.0, None))[1]:
            _silent[constants.ENDPOINT] = time.monotonic(), error
        try:
            return str(_library().snapshot_download(path, local_files_only=True))
        except (OSError, ValueError):
            raise ValueError(
                f"expected a folder, or a model that is cached or on a hub that answers, got {constants.ENDPOINT}: "
                f"{first_line(error)}"
            ) from error
