"""What a folder of S2SentModel or its classifier says of them, and how both are saved and loaded: S2SentConfig, SavedModel."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hub, model_kinds
from .checkpoints import pretrained
from .files import WEIGHTS, importing, open_to_umask
from .quiet import without_bars
from .selector import S2SentSelector

with importing("transformers", "transformers"):
    import transformers


class S2SentConfig(transformers.PreTrainedConfig):
    """The encoder's configuration and class name, which of its blocks are fused and how, and the selector's arguments.

    ``encoder_config`` is a configuration, or its ``to_dict()``. In a model it is the encoder's own ``config``, so that what is
    changed there is saved.
    """

    model_type = "s2sent"
    sub_configs = {"encoder_config": transformers.AutoConfig}  # noqa: RUF012  the library passes attn_implementation on

    def __init__(
        self,
        encoder_config: dict[str, Any] | transformers.PreTrainedConfig | None = None,
        encoder_class: str | None = None,
        blocks: Sequence[int] | None = None,
        block_norm: str | None = "final",
        pooling: str = "mean",
        selector: dict[str, Any] | None = None,
        head: bool = False,
        classifier_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if isinstance(encoder_config, dict):
            encoder_config = transformers.AutoConfig.for_model(**encoder_config)
        self.encoder_config, self.encoder_class = encoder_config, encoder_class
        self.blocks = None if blocks is None else list(blocks)
        self.block_norm, self.pooling, self.selector = block_norm, pooling, selector
        self.head, self.classifier_dropout = head, classifier_dropout
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in the library, which takes another model's configuration with a warning.

        Raises:
            ValueError: it is that of another model; tells what loads it.
        """
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type:
            expected = "pretrained_model_name_or_path: expected an S2SentModel or its classifier"
            raise ValueError(f"{expected}, {model_kinds.got(pretrained_model_name_or_path)}")
        return found, unused

    @property
    def vocab_size(self) -> int | None:
        """The encoder's, which resizing the token embeddings changes."""
        return getattr(self.encoder_config, "vocab_size", None)

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        if self.encoder_config is not None:
            self.encoder_config.vocab_size = value

    @property
    def hidden_size(self) -> int | None:
        """D, which is the embedding's size too."""
        return None if self.selector is None else self.selector["hidden_size"]


class SavedModel(transformers.PreTrainedModel):
    """What S2SentModel and the classifier have in common: how they are saved and loaded."""

    config_class = S2SentConfig
    # The encoder, not this class, decides which implementations of attention it has.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _selector_keys: str  # matches the names of the selector's tensors

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        """The library asks which tensors are not loaded in the model's dtype. A selector's keep that of their file: rounded to an
        encoder's 16 bits, its running statistics would give other gates. Early releases of the library do not ask; they load the
        float32 of ``__init__``."""
        return {**super()._get_dtype_plan(dtype), self._selector_keys: None}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the library; what a selector lacks starts as in its constructor, of which the library knows nothing."""
        if not isinstance(module, S2SentSelector):
            super()._init_weights(module)
            return
        # The library marks each tensor that it has read. What a selector's parts lack it has initialised as an encoder's.
        unread = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if not getattr(tensor, "_is_hf_initialized", False)
        }
        if unread:
            fresh = S2SentSelector(**self.config.selector).state_dict()
            for name, tensor in unread.items():
                tensor.copy_(fresh[name])

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """As in the library. The configuration that is saved describes encoder and selector as they are now.

        Raises:
            ValueError: a tensor of the selector is quantised or sharded, and ``state_dict`` does not give what to save; or one of
                the blocks was removed from the encoder; names it.
        """
        model: Any = self.base_model
        if options.get("state_dict") is None:
            pretrained.check_savable(model.selector.state_dict())
        self.config.blocks = list(model.capture.find_again())
        self.config.encoder_config = model.encoder.config  # another object where the caller has replaced one
        self.config.selector = {**self.config.selector, **model.selector.arguments}
        super().save_pretrained(save_directory, *arguments, **options)
        open_to_umask(Path(save_directory), WEIGHTS)


# Those of from_pretrained's options that say where a configuration is.
OF_HUB = ("cache_dir", "code_revision", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a configuration's encoder: of T5 and its kind the encoder alone."""
    encodes = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if encodes else transformers.AutoModel


@without_bars
def load_encoder(
    path: str | os.PathLike[str], model_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> transformers.PreTrainedModel:
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs: expected a mapping, got {type(model_kwargs).__name__}")
    for name in options:
        if name in (model_kwargs or ()):
            raise ValueError(f"model_kwargs: expected none of the other arguments in it, got {name}, which is one")
    given = {**hub.NO_CODE, **options, **(model_kwargs or {})}
    # The encoder of a SentenceTransformer lies in its folder as one alone does.
    if model_kinds.held(path) not in (model_kinds.ENCODER, None) and not model_kinds.has_modules(path):
        raise ValueError(f"path_or_model: expected an encoder, {model_kinds.got(path)}")
    try:
        config = given.get("config")
        if config is None:
            of_hub = {name: given[name] for name in OF_HUB if name in given}
            config = transformers.AutoConfig.from_pretrained(path, **of_hub)
        return auto_class(config).from_pretrained(path, **given)
    except (OSError, pickle.UnpicklingError) as error:  # the latter: weights in a pickle that holds more than tensors
        reason = " ".join(str(error).split())
        raise ValueError(f"path_or_model: expected a folder or a hub's model, got {str(path)!r}: {reason}") from error
