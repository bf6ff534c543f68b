"""S2SentModel: an encoder with a selector behind it as one model of the library transformers. Needs the extra of that name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import families, functional, reference, validate
from .capture import BLOCK_NORMS, BlockCapture
from .selector import S2SentSelector

try:
    import transformers
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError("transformers is not installed: pip install 's2sent_kernels[transformers]'") from error


class S2SentConfig(transformers.PreTrainedConfig):
    """The encoder's configuration and class name, which of its blocks are fused and how, and the selector's arguments."""

    model_type = "s2sent"

    def __init__(
        self,
        encoder_config: dict[str, Any] | None = None,
        encoder_class: str | None = None,
        blocks: Sequence[int] | None = None,
        block_norm: str | None = "final",
        pooling: str = "mean",
        selector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder_config, self.encoder_class = encoder_config, encoder_class
        self.blocks = None if blocks is None else list(blocks)
        self.block_norm, self.pooling, self.selector = block_norm, pooling, selector
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int | None:
        """D, which is the embedding's size too."""
        return None if self.selector is None else self.selector["hidden_size"]


@dataclass
class S2SentOutput(ModelOutput):
    """embedding o [B, D]; on request tokens v [B, L, D] and gates g [B, N, D]."""

    embedding: Tensor | None = None
    tokens: Tensor | None = None
    gates: Tensor | None = None


class S2SentModel(transformers.PreTrainedModel):
    """Sentence embeddings from several blocks of an encoder. Made by ``from_encoder`` or ``from_pretrained``."""

    config_class = S2SentConfig
    supports_gradient_checkpointing = (
        True  # the encoder's own; a reentrant one is refused where it would lose gradients
    )

    def __init__(self, config: S2SentConfig) -> None:
        super().__init__(config)
        if config.encoder_config is None or config.encoder_class is None or config.selector is None:
            raise ValueError("config: expected encoder_config, encoder_class and selector, as from_encoder sets them")
        encoder_class = getattr(transformers, config.encoder_class, None)
        if encoder_class is None:
            raise ValueError(f"encoder_class: expected a model class of transformers, got {config.encoder_class!r}")
        self.encoder = encoder_class(transformers.AutoConfig.for_model(**config.encoder_config))
        self.selector = S2SentSelector(**config.selector)
        self._capture = BlockCapture(self.encoder, config.blocks, block_norm=config.block_norm)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        path_or_model: str | os.PathLike[str] | transformers.PreTrainedModel,
        blocks: Sequence[int] | str | None = "last:3",
        *,
        block_norm: str | None = "final",
        pooling: str = "mean",
        **selector: Any,
    ) -> S2SentModel:
        """A fresh selector behind an encoder; ``selector`` goes to S2SentSelector (bottleneck, block_prior, ...).

        A model that is given is used, not copied.

        Raises:
            ValueError, TypeError: an argument is wrong, there is no such model, or the encoder's blocks cannot be found.
        """
        validate.option("block_norm", block_norm, BLOCK_NORMS)
        validate.option("pooling", pooling, validate.POOLINGS)
        encoder: Any = path_or_model
        if isinstance(path_or_model, (str, os.PathLike)):
            try:
                encoder = transformers.AutoModel.from_pretrained(path_or_model)
            except OSError as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"path_or_model: expected a folder or a hub's model, got {str(path_or_model)!r}: {reason}"
                ) from error
        chosen = families.indices(blocks, len(families.find_blocks(encoder)))
        arguments = {"hidden_size": families.hidden_size(encoder), "num_blocks": len(chosen), **selector}
        fresh = S2SentSelector(**arguments)  # first, since it judges the arguments
        config = S2SentConfig(encoder.config.to_dict(), type(encoder).__name__, chosen, block_norm, pooling, arguments)
        with torch.device("meta"):  # __init__'s own encoder and selector are not those that are wanted
            model = cls(config)
        model._capture.remove()
        model.encoder, model.selector = encoder, fresh.to(encoder.device)
        model._capture = BlockCapture(encoder, chosen, block_norm=block_norm)
        return model.eval()

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_tokens: bool = False,
        output_gates: bool = False,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> S2SentOutput | tuple[Tensor, ...]:
        """The embedding of each sentence; ``encoder_inputs`` are the encoder's further ones. A tuple of what there is where
        ``return_dict`` is False."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        encoder_inputs |= {name: tensor for name, tensor in given.items() if tensor is not None}
        output = self._fuse(encoder_inputs, output_tokens, output_gates)
        return output if return_dict is not False else output.to_tuple()

    def _fuse(self, encoder_inputs: dict[str, Any], output_tokens: bool, output_gates: bool) -> S2SentOutput:
        pooling = self.config.pooling
        if not (output_tokens or output_gates):
            return S2SentOutput(embedding=self._capture.pool(self.selector, pooling=pooling, **encoder_inputs))
        # One set of gates for all of it: in training each look at the sentences would count as a batch.
        mask = encoder_inputs.get("attention_mask")
        states = self._capture.collect(**encoder_inputs)
        selector = self.selector
        squeezed, pooled = functional.squeeze(
            states, mask, frequencies=selector.frequencies, profile=selector.profile, pooling=pooling,
            backend=selector.backend,
        )  # fmt: skip
        assert pooled is not None  # with a pooling
        gates = selector._gate(squeezed)
        return S2SentOutput(
            embedding=reference.pool(gates, pooled, states[0].dtype),
            tokens=functional.fuse(states, gates, mask, backend=selector.backend) if output_tokens else None,
            gates=gates if output_gates else None,
        )


transformers.AutoConfig.register("s2sent", S2SentConfig)
transformers.AutoModel.register(S2SentConfig, S2SentModel)
