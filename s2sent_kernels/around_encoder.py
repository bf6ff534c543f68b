"""What a model of the library transformers that stands around an encoder needs: a ``forward`` whose signature names the encoder's
inputs, and an encoder that judges what is asked of it.

Callers ask ``inspect.signature(model.forward)`` what a model takes. Trainer drops the columns of a data set that are not named
there, so that an input of the encoder which is hidden in ``**encoder_inputs`` would be lost without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from .files import importing

with importing("transformers", "transformers"):
    import transformers
    from transformers.utils import ModelOutput

# What an encoder takes beside its inputs: these ask for more of its output, or for another form.
OF_THE_OUTPUT = ("output_attentions", "output_hidden_states", "return_dict")
# Options of a call that ask for an encoder's outputs, and what these are called.
OUTPUTS = {"output_attentions": "attentions", "output_hidden_states": "hidden_states"}
# Inputs of many encoders, which a forward names itself.
USUAL = ("token_type_ids", "position_ids", "inputs_embeds")


class NamesEncoderInputs:
    """Decorates ``forward(self, ..., **encoder_inputs)`` of a model whose encoder is its own, or its base model's.

    Nothing is kept on the model, so that its copies, pickles and replicas each name the inputs of their own encoder.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, model: Any, owner: type | None = None) -> Callable[..., Any]:
        if model is None:
            return self._function
        if torch.compiler.is_compiling():  # torch.compile traces a partial, but not the making of a method
            return functools.partial(self._function, model)
        encoder = getattr(getattr(model, model.base_model_prefix, model), "encoder", None)
        if not isinstance(encoder, nn.Module):  # while the model is made
            return MethodType(self._function, model)
        return MethodType(_naming(self._function, type(encoder).forward), model)


@functools.cache
def _naming(function: Callable[..., Any], encoder_forward: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with the inputs that the encoder takes in its signature, and no others."""

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    theirs = inspect.signature(encoder_forward).parameters
    own = {name: each for name, each in signature.parameters.items() if name not in USUAL}
    rest = own.popitem()[1]  # **encoder_inputs
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    inputs = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in theirs.items()
        if name not in own and name not in OF_THE_OUTPUT and each.kind not in variadic
    ]
    takes_others = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in theirs.values())
    parameters = [*own.values(), *inputs, *([rest] if takes_others else [])]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


class AroundEncoder(transformers.PreTrainedModel):
    """What both models have in common as they are called: inputs are the encoder's, outputs those of this package."""

    base_model_prefix = "model"  # so that a classifier's folder opens as its model, too
    # The encoder's own; a reentrant one is refused where it would lose gradients.
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # else Trainer would leave it to the loss to divide by the steps of accumulation
    # Names of weights that ``from_pretrained`` did not find, and of those that it found and does not know.
    missing_weights: Sequence[str] = ()
    unexpected_weights: Sequence[str] = ()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. The encoder's final norm is found once it has its weights. Weights that the file lacks are
        drawn anew and reported, as of any model of transformers; ``missing_weights`` and ``unexpected_weights`` name what does
        not fit.

        Raises:
            ValueError: as BlockCapture, beside what transformers raises.
        """
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, found = loaded
        model.missing_weights, model.unexpected_weights = (
            sorted(found["missing_keys"]),
            sorted(found["unexpected_keys"]),
        )
        model.base_model.capture.settle()
        return loaded if wanted else model

    @property
    def vocab_size(self) -> int | None:
        return self.config.vocab_size

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """The encoder's, as in the library, so that the encoder's configuration has the new size."""
        base: Any = self.base_model
        return base.encoder.resize_token_embeddings(*arguments, **options)

    def set_attn_implementation(self, *arguments: Any, **options: Any) -> None:
        """The encoder's, as in the library."""
        base: Any = self.base_model
        base.encoder.set_attn_implementation(*arguments, **options)
        for model in (self, base):
            model.config._attn_implementation = base.encoder.config._attn_implementation

    def _asked(self, given: dict[str, Any]) -> dict[str, bool]:
        """Which of the encoder's outputs are asked for, by the call or the configuration. ``given`` loses these options."""
        options = {name: given.pop(name, None) for name in OUTPUTS}
        return {name: True for name, one in options.items() if one or (one is None and getattr(self.config, name))}

    @staticmethod
    def _outputs(found: Any, asked: dict[str, bool]) -> dict[str, Any]:
        """Those of the encoder's outputs that were asked for, as it returns them: its attention may give no weights."""
        return {OUTPUTS[name]: getattr(found, OUTPUTS[name], None) for name in asked}

    def _form(self, output: ModelOutput, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
