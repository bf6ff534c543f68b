"""What every load of an encoder has in common: no code of the model's is run, and a hub that does not answer is asked once."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from .files import first_line, require

# Unset, transformers asks on a terminal and reads the answer from standard input, where texts may be.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
ASKED_EVERY = 60.0  # seconds, for which a hub's answer counts, or that it gave none
_asked: dict[str, tuple[float, str | None]] = {}  # by endpoint: when it was asked, and why it did not answer


def _library(module: str = "huggingface_hub") -> Any:
    return require(module, "huggingface_hub", "transformers")


def offline() -> str | None:
    """Why no hub is asked, in words, where the environment says so; else None."""
    if not _library("huggingface_hub.constants").HF_HUB_OFFLINE:
        return None
    # The library takes both for the same.
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    return f"{names[0] if names else 'HF_HUB_OFFLINE'} is set, so the hub was not asked"


def is_asked(path: str) -> bool:
    """Whether an encoder's path, as ``sources.find_model`` gives it, is the id of a hub that is asked over a network."""
    return not os.path.isdir(path) and offline() is None


def reached(path: str) -> str:
    """``path``, if it is a folder or its hub answers; else the folder where it is cached.

    Loaders that are given an id try for half a minute, for each file anew, before they take what is cached.

    Raises:
        ValueError: the hub does not answer, and nothing is cached.
    """
    if silent(path) is None:
        return path
    try:
        return str(_library().snapshot_download(path, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"it is not cached, and {silent(path)}") from error


def silent(path: str) -> str | None:
    """That the hub of this id does not answer, in words with the reason; None where it does, or is not asked."""
    if not is_asked(path) or (reason := _why_silent(path)) is None:
        return None
    return f"the hub {_library('huggingface_hub.constants').ENDPOINT} does not answer ({reason})"


def _why_silent(path: str) -> str | None:
    """Why the hub does not answer, or None where it does. It is asked for a model, for as long as HF_HUB_ETAG_TIMEOUT says."""
    constants, errors = _library("huggingface_hub.constants"), _library("huggingface_hub.errors")
    when, reason = _asked.get(constants.ENDPOINT, (-math.inf, None))
    if time.monotonic() < when + ASKED_EVERY:
        return reason
    try:
        _library().HfApi().model_info(path, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        reason = None
    except (errors.HfHubHTTPError, ValueError):  # it answers, or the id is none: the loaders word it
        reason = None
    except Exception as error:  # of the library's HTTP client, another one in each of its releases
        reason = first_line(error)
    _asked[constants.ENDPOINT] = time.monotonic(), reason
    return reason
