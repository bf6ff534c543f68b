"""S2SentModel: an encoder with a selector behind it as one model of the library transformers. Needs the extra of that name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import families, functional, input_tokens, offloaded, validate
from .around_encoder import OUTPUTS, AroundEncoder, NamesEncoderInputs
from .capture import BLOCK_NORMS, BlockCapture
from .checkpoints import published_model
from .consumers import KeptStates
from .files import importing
from .formula import reference
from .formula.call import POOLINGS
from .saved_model import S2SentConfig, SavedModel, load_encoder
from .selector import S2SentSelector

with importing("transformers", "transformers"):
    import transformers
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.utils import ModelOutput


@dataclass
class S2SentOutput(ModelOutput):
    """embedding o [B, D]; on request tokens v [B, L, D] and gates g [B, N, D], and the encoder's own hidden states and
    attentions, as it returns them."""

    embedding: Tensor | None = None
    tokens: Tensor | None = None
    gates: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Head(nn.Module):
    """tanh(W o + b), which the published code trains behind the embedding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)

    def forward(self, embedding: Tensor) -> Tensor:
        return torch.tanh(self.dense(embedding))


class S2SentModel(AroundEncoder, SavedModel):
    """Sentence embeddings from several blocks of an encoder. Made by ``from_encoder``, ``from_published`` or
    ``from_pretrained``.

    ``dtype`` of ``from_pretrained`` is that of the encoder and the head. The selector has the dtype that it was saved in; a fresh
    one has float32. ``model.to(dtype)`` casts all of them.
    """

    _selector_keys = r"^selector\."

    def __init__(self, config: S2SentConfig) -> None:
        super().__init__(config)
        if config.encoder_config is None or config.encoder_class is None or config.selector is None:
            raise ValueError("config: expected encoder_config, encoder_class and selector, as from_encoder sets them")
        encoder_class = getattr(transformers, config.encoder_class, None)
        if encoder_class is None:
            raise ValueError(f"encoder_class: expected a model class of transformers, got {config.encoder_class!r}")
        self.encoder = encoder_class(config.encoder_config)
        config.encoder_config = self.encoder.config
        config._attn_implementation = self.encoder.config._attn_implementation
        self.selector = S2SentSelector(**config.selector).float()  # the default dtype here is the encoder's
        self.head = _Head(self.selector.hidden_size) if config.head else None
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
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **selector: Any,
    ) -> S2SentModel:
        """A fresh selector behind an encoder; ``selector`` goes to S2SentSelector (bottleneck, block_prior, ...).

        A model that is given is used, not copied.

        Args:
            dtype, attn_implementation: of an encoder that is loaded from a path, as AutoModel.from_pretrained takes them.
            model_kwargs: its other options, as ``revision`` or a value of the encoder's configuration.

        Raises:
            ValueError, TypeError: an argument is wrong, there is no such model, or the encoder's blocks cannot be found; or one
                of these three is given beside a model.
        """
        validate.option("block_norm", block_norm, BLOCK_NORMS)
        validate.option("pooling", pooling, POOLINGS)
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "model_kwargs": model_kwargs}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        encoder: Any = path_or_model
        if isinstance(path_or_model, (str, os.PathLike)):
            encoder = load_encoder(path_or_model, **given)
        elif given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name}: expected none beside a model, which is used as it is, got {value!r} with {type(encoder).__name__}"
            )
        chosen = families.indices(blocks, len(families.find_blocks(encoder)))
        arguments = {"hidden_size": families.hidden_size(encoder), "num_blocks": len(chosen), **selector}
        fresh = S2SentSelector(**arguments)  # first, since it judges the arguments
        return cls._of(encoder, fresh, arguments, chosen, block_norm, pooling)

    @classmethod
    def from_published(
        cls,
        path: str | os.PathLike[str],
        blocks: Sequence[int] | str | None = None,
        *,
        pooling: str = "mean",
        head: bool = False,
    ) -> S2SentModel:
        """A whole checkpoint of the published code (github.com/hggzjx/S2Sent), with its arithmetic (``profile="official"``): a
        folder with the encoder's config.json and, in model.safetensors or pytorch_model.bin, the encoder under ``bert.`` or
        ``roberta.``, the selector under ``S2A.`` and the head under ``mlp.``.

        Args:
            blocks: which blocks the selector was trained on; by default the last, as many as it has.
            pooling: as it was trained: "mean" is the published "avg".
            head: apply the head. The published code does so in training, and at evaluation with its pooler "cls" alone.

        The head of a masked language model (``lm_head.``, ``cls.``), which the published training may also use, is ignored.

        Raises:
            ValueError: there is no such folder or file, it is no BERT or RoBERTa, or a key is missing, unknown or of another
                shape; names it.
        """
        validate.option("pooling", pooling, POOLINGS)
        published = published_model.read(path)
        selector = S2SentSelector(**published.arguments)
        selector.to(published.selector["down.weight"].dtype).load_state_dict(published.selector)
        selector = selector.float().eval()
        num_blocks = selector.num_blocks
        chosen = families.indices(
            f"last:{num_blocks}" if blocks is None else blocks, len(families.find_blocks(published.encoder))
        )
        if len(chosen) != num_blocks:
            raise ValueError(f"blocks: expected {num_blocks}, as the selector has, got {chosen}")
        if head and not published.head:
            raise ValueError(f"head: expected keys mlp. in {path}, there are none")
        model = cls._of(published.encoder, selector, published.arguments, chosen, "final", pooling, head)
        if model.head is not None:
            model.head.to_empty(device="cpu").load_state_dict(published.head)
        return model

    @classmethod
    def _of(
        cls,
        encoder: Any,
        selector: S2SentSelector,
        arguments: dict[str, Any],
        chosen: Sequence[int],
        block_norm: str | None,
        pooling: str,
        head: bool = False,
    ) -> S2SentModel:
        """A model of these modules, in eval mode; its head has no weights yet."""
        config = S2SentConfig(
            encoder.config.to_dict(), type(encoder).__name__, chosen, block_norm, pooling, arguments, head
        )
        config._attn_implementation = encoder.config._attn_implementation
        with torch.device("meta"):  # __init__'s own encoder and selector are replaced below
            model = cls(config)
        model.release()
        model.encoder, model.selector = encoder, selector.to(offloaded.device_of(encoder))
        model.config.encoder_config = encoder.config
        model._capture = BlockCapture(encoder, chosen, block_norm=block_norm)
        return model.eval()

    @property
    def capture(self) -> BlockCapture:
        """The hooks on the encoder's blocks."""
        return self._capture

    def release(self) -> None:
        """Remove the hooks from the encoder's blocks; the model cannot run afterwards."""
        self._capture.remove()

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.encoder.set_input_embeddings(value)

    @NamesEncoderInputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        output_tokens: bool = False,
        output_gates: bool = False,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> S2SentOutput | tuple[Tensor, ...]:
        """The embedding of each sentence; ``encoder_inputs`` are the encoder's other inputs, which the signature of a model's own
        ``forward`` names. A tuple of the present outputs where ``return_dict`` is False; by default as the configuration says.

        Args:
            pooling_mask: [B, L], nonzero at the tokens that count; by default ``attention_mask``. One is needed beside an
                attention mask of another form, as one of pairs of tokens [B, 1, L, L].

        Raises:
            ValueError: ``labels``, of which this model returns nothing; or the attention mask is no [B, L], and there is no
                ``pooling_mask``.
        """
        asked = self._asked(encoder_inputs)
        if encoder_inputs.get("labels") is not None:
            raise ValueError("labels: expected none of an S2SentModel, which has no loss, got some")
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        encoder_inputs |= {name: tensor for name, tensor in given.items() if tensor is not None}
        return self._form(self._fuse(encoder_inputs, pooling_mask, output_tokens, output_gates, asked), return_dict)

    def _fuse(
        self,
        encoder_inputs: dict[str, Any],
        mask: Tensor | None,
        output_tokens: bool,
        output_gates: bool,
        asked: dict[str, bool],
    ) -> S2SentOutput:
        pooling = self.config.pooling
        if not (output_tokens or output_gates or asked):
            embedding = self._capture.pool(self.selector, pooling=pooling, pooling_mask=mask, **encoder_inputs)
            return S2SentOutput(embedding=embedding if self.head is None else self.head(embedding))
        # One set of gates for all outputs: in training each gate counts as a batch of the running statistics.
        mask = input_tokens.mask_of(encoder_inputs, mask)
        kept = KeptStates()
        found = self._capture.run(kept, **encoder_inputs, **asked)
        states = kept.hidden_states
        gates, pooled = self.selector.gates_and_pooled(states, mask, pooling=pooling)
        embedding = reference.pool(gates, pooled, states[0].dtype)
        return S2SentOutput(
            embedding=embedding if self.head is None else self.head(embedding),
            tokens=functional.fuse(states, gates, mask, backend=self.selector.backend) if output_tokens else None,
            gates=gates if output_gates else None,
            **self._outputs(found, asked),
        )


class S2SentForSequenceClassification(AroundEncoder, SavedModel):
    """A dropout and a linear layer behind the embedding; the loss is transformers' own for ``problem_type``. The layer has the
    encoder's dtype, the selector its own, as in S2SentModel."""

    _selector_keys = r"^model\.selector\."

    def __init__(self, config: S2SentConfig) -> None:
        super().__init__(config)
        self.model = S2SentModel(config)
        self._add_classifier()
        self.post_init()

    def _add_classifier(self) -> None:
        self.dropout = nn.Dropout(self.config.classifier_dropout)
        self.classifier = nn.Linear(self.model.selector.hidden_size, int(self.config.num_labels or 0))

    @classmethod
    def from_encoder(
        cls,
        path_or_model: str | os.PathLike[str] | transformers.PreTrainedModel,
        blocks: Sequence[int] | str | None = "last:3",
        *,
        num_labels: int = 2,
        problem_type: str | None = None,
        classifier_dropout: float = 0.1,
        **options: Any,
    ) -> S2SentForSequenceClassification:
        """A fresh selector and classifier behind an encoder; ``options`` go to ``S2SentModel.from_encoder``.

        Raises:
            ValueError, TypeError: as ``S2SentModel.from_encoder``.
        """
        return cls.from_model(
            S2SentModel.from_encoder(path_or_model, blocks, **options),
            num_labels=num_labels,
            problem_type=problem_type,
            classifier_dropout=classifier_dropout,
        )

    @classmethod
    def from_model(
        cls,
        model: S2SentModel,
        *,
        num_labels: int = 2,
        problem_type: str | None = None,
        classifier_dropout: float = 0.1,
    ) -> S2SentForSequenceClassification:
        """A fresh classifier behind a model, which is used, not copied."""
        given = {"classifier_dropout": classifier_dropout, "problem_type": problem_type, "num_labels": num_labels}
        known = model.config.to_dict()
        if model.config.num_labels != num_labels:  # names of other labels
            known = {key: value for key, value in known.items() if key not in ("id2label", "label2id")}
        config = S2SentConfig(**known | given)
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):  # of __init__, only the classifier is wanted
            whole = cls(config)
        whole.model.release()
        whole.model, config.encoder_config = model, model.encoder.config
        whole._add_classifier()
        whole.classifier.to(model.device, model.dtype)
        return whole.eval()

    @NamesEncoderInputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, num_labels] and, with ``labels``, the loss; inputs and ``return_dict`` as S2SentModel's.

        Raises:
            ValueError: as S2SentModel's; or ``output_tokens`` or ``output_gates``, of which a classifier returns nothing.
        """
        asked = self._asked(encoder_inputs)
        for option in ("output_tokens", "output_gates"):
            if encoder_inputs.pop(option, False):
                raise ValueError(
                    f"{option}: expected False of a classifier, got True: call its model with {option}=True"
                )
        found = self.model(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pooling_mask=pooling_mask,
            return_dict=True,
            **dict.fromkeys(OUTPUTS, False) | asked,
            **encoder_inputs,
        )
        logits = self.classifier(self.dropout(found.embedding))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )
        return self._form(output, return_dict)


transformers.AutoConfig.register("s2sent", S2SentConfig)
transformers.AutoModel.register(S2SentConfig, S2SentModel)
transformers.AutoModelForSequenceClassification.register(S2SentConfig, S2SentForSequenceClassification)
