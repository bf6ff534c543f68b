"""S2SentPooling: the selector in the place of Pooling in a SentenceTransformer. Needs the extra sentence-transformers.

    transformer = Transformer("sentence-transformers/all-MiniLM-L6-v2")
    model = SentenceTransformer(modules=[transformer, S2SentPooling.behind(transformer, blocks="last:3")])

Everything else (encode, prompts, similarity, losses, the trainer, quantisation, pools of processes) is the library's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import absent, families, model_card, pooling_modes, sentences, validate
from .capture import BLOCK_NORMS, BlockListener
from .checkpoints import folders, pretrained
from .consumers import KeptStates
from .features import Kept, Stream, pool, streams
from .files import WEIGHTS, importing, open_to_umask
from .quiet import without_bars
from .selector import S2SentSelector

if TYPE_CHECKING:
    from typing_extensions import Self

with importing("sentence-transformers 6 or newer", "sentence-transformers"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling


class S2SentPooling(Pooling):
    """Sentence embeddings from the hidden states of the transformer before it in the list of modules.

    It follows that transformer's blocks, so it must know the transformer. ``behind`` attaches it, and so does a model that is
    made of modules or loaded: by this module's ``load``, or by SentenceTransformer itself with ``trust_remote_code=True``. Behind
    a Router it follows the transformer of each route. A module that is appended to a finished model needs ``attach``.

    Without gradients (grad mode off, or nothing that requires one) large hidden states are pooled as each block finishes, and
    freed. This needs a transformer that is called with the features, as sentence-transformers does. A call of a plain
    transformers model does not tell the length of prompts: the hidden states are kept until this module runs.

    The selector keeps its own dtype beside an encoder in another: float32 if it is fresh, and that of its file if it is loaded.
    A SentenceTransformer casts each of its modules ``to`` its first one's dtype, which would round the running statistics, so
    ``to`` moves this module and casts nothing. ``half``, ``bfloat16`` and ``double`` cast, and so does ``to`` of the whole model.
    A model with a device map casts every parameter by itself, and rounds the selector's.

    A copy or a pickle of this module alone is without its transformer, and needs ``attach`` or another model; beside its
    transformer's copy it follows that one. Where a module is forgotten, its hooks leave the transformer.

    Losses that train the layers one by one (AdaptiveLayerLoss, Matryoshka2dLoss) are refused at their first step.

    Args:
        selector: the arguments of S2SentSelector.
        blocks: which blocks, 0 the lowest.
        block_norm: as BlockCapture's.
        pooling: "mean", "cls", "last" (or "lasttoken"), "mean_sqrt_len_tokens", "weightedmean" or "max" as in Pooling, or
            several of them side by side, each with D features. All are of one squeeze and one gate, and all but "max" pool the
            blocks in the place of the fused tokens; for "max" the tokens are fused, and the hidden states of all blocks kept.
        include_prompt: whether a prompt's tokens count.
    """

    _is_loaded = False  # until its model is complete
    provenance: dict[str, Any] | None = None  # how `s2sent train` made it, an entry of its configuration
    config_keys = ["selector_arguments", "blocks", "block_norm", "pooling", "include_prompt"]  # noqa: RUF012

    def __init__(
        self,
        selector_arguments: dict[str, Any],
        blocks: Sequence[int],
        block_norm: str | None = "final",
        pooling: str | Sequence[str] = "mean",
        include_prompt: bool = True,
    ) -> None:
        # A Pooling, so that set_pooling_include_prompt and its like find it; but its state is not one's.
        super(Pooling, self).__init__()
        validate.option("block_norm", block_norm, BLOCK_NORMS)
        self._set_pooling(pooling)
        self.selector_arguments, self.blocks = dict(selector_arguments), list(blocks)
        self.block_norm, self.include_prompt = block_norm, include_prompt
        self.selector = S2SentSelector(**self.selector_arguments)
        self._keep([])

    @classmethod
    def behind(
        cls,
        transformer: nn.Module,
        blocks: Sequence[int] | str | None = "last:3",
        *,
        block_norm: str | None = "final",
        pooling: str | Sequence[str] = "mean",
        include_prompt: bool = True,
        **selector: Any,
    ) -> S2SentPooling:
        """A fresh selector behind ``transformer``, a Transformer of sentence-transformers or a model of transformers;
        ``selector`` goes to S2SentSelector (bottleneck, block_prior, ...).

        Raises:
            ValueError, TypeError: an argument is wrong, or the transformer's blocks cannot be found.
        """
        encoder = _encoder_of(transformer)
        chosen = families.indices(blocks, len(families.find_blocks(encoder)))
        arguments = {"hidden_size": families.hidden_size(encoder), "num_blocks": len(chosen), **selector}
        module = cls(arguments, chosen, block_norm, pooling, include_prompt)
        module.attach(transformer)
        return module

    def attach(self, *transformers: nn.Module) -> None:
        """Follow the blocks of these instead of others': of one transformer, or of several where a Router calls one of them.

        Raises:
            ValueError, TypeError: a transformer's blocks cannot be found, or do not fit the selector. Those followed before still
                are.
        """
        before, made = self._listeners, []
        try:
            for transformer in transformers:
                # sentence-transformers' Transformer bypasses its encoder's own hooks, so the Transformer is followed.
                listener = BlockListener(
                    _encoder_of(transformer),
                    self.blocks,
                    block_norm=self.block_norm,
                    called=transformer,
                    consumer=_Follower(self),
                )
                made.append(listener)
                listener.capture.check(self.selector)
        except BaseException:
            _remove(made)
            raise
        self._keep(made)
        _remove(before)

    def _keep(self, listeners: list[BlockListener]) -> None:
        """These are the module's own. Their hooks go when it does, as where a notebook's cell makes another one."""
        self._listeners = listeners
        weakref.finalize(self, _remove, listeners).atexit = False

    def on_model_ready(self, model: BaseModel) -> None:
        """Follow the transformers before this module in ``model``; sentence-transformers calls it once the model is complete.

        Raises:
            ValueError: this module was loaded, and a transformer beside it without all of its weights; names them.
        """
        found = _transformers_before(self, model)
        if self._is_loaded:  # transformers that were loaded by others may be there to be trained
            self._is_loaded = False
            for transformer in found:
                encoder: Any = _encoder_of(transformer)
                absent.check(encoder.config.name_or_path, encoder, absent.unread(encoder))
        if found and found != [listener.called for listener in self._listeners]:
            self.attach(*found)
        model_card.describe(model)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding`` [B, D] to the features.

        Raises:
            RuntimeError: no transformer is attached or it did not run; or it ran without gradients, and the selector's are
                wanted now.
            ValueError: the features that decide which tokens count were replaced since the transformer ran, or a module in
                between has weighted its tokens, which does not reach the blocks' hidden states.
        """
        if "token_weights_sum" in features:
            raise ValueError(
                "features: expected no module between the transformer and S2SentPooling that weights tokens (WordWeights), since "
                "the hidden states of the blocks are pooled, got token_weights_sum"
            )
        if not self._listeners:
            raise RuntimeError(
                "S2SentPooling does not know its transformer: expected one before it in the modules of a SentenceTransformer, "
                "or a call of attach"
            )
        heard = next((listener for listener in self._listeners if listener.heard), self._listeners[0])
        consumer = heard.take_consumer()
        if isinstance(consumer, Stream):
            features["sentence_embedding"] = consumer.result(features)
            return features
        assert isinstance(consumer, KeptStates)
        if isinstance(consumer, Kept):  # a call without a dictionary of features tells nothing of them
            consumer.check(features)
        features["sentence_embedding"] = pool(
            self.selector, self.pooling, features, self.include_prompt, consumer.hidden_states
        )
        return features

    @property
    def listener(self) -> BlockListener | None:
        """Follows the transformer's blocks as long as this module lives; None until ``attach``, the first of several behind a
        Router."""
        return self._listeners[0] if self._listeners else None

    def _stream(self, features: Any = None, *args: Any) -> Kept | Stream | None:
        """The consumer of the hidden states of a call of a transformer with these arguments; None keeps them."""
        captures = []
        for listener in self._listeners:
            _refuse_layers_apart(listener.called)
            listener.forget()  # what another route's transformer did and nobody took
            captures.append(listener.capture)
        if not isinstance(features, Mapping):
            return None
        if not streams(self.pooling) or torch.compiler.is_exporting():  # as in BlockCapture.pool
            return Kept(features)
        if any(one.needs_gradient(self.selector, features) for one in captures):
            return Kept(features)
        return Stream(self, features)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a file of this module alone is without the transformer. One of both has the hooks, which belong to the
        transformer, and within each the ``_Follower`` that makes the module follow it again."""
        listeners = [listener for listener in self._listeners if not isinstance(listener._consumer, _Follower)]
        return {**self.__dict__, "_listeners": listeners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_listener" in state:  # written when a module followed one transformer
            listener = state.pop("_listener")
            state["_listeners"] = [] if listener is None else [listener]
        super().__setstate__(state)
        if not self._listeners:  # else written when a module held its listeners, and was held by them
            self._keep([])

    def get_embedding_dimension(self) -> int:
        return self.selector.hidden_size * len(pooling_modes.parse(self.pooling))

    # What others read of a Pooling that they have found among a model's modules. ``pooling_mode`` they also set.
    pooling_output_dimension = property(get_embedding_dimension)
    embedding_dimension = property(lambda self: self.selector.hidden_size)
    pooling_mode = property(
        lambda self: pooling_modes.by_the_library(self.pooling), lambda self, value: self._set_pooling(value)
    )

    def _set_pooling(self, pooling: str | Sequence[str]) -> None:
        pooling_modes.parse(pooling)
        self.pooling = pooling if isinstance(pooling, str) else list(pooling)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves to a device, given as torch.nn.Module.to takes it; a dtype is left out (see above)."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device=device, non_blocking=non_blocking)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As in the library. ValueError where a tensor is quantised or sharded, or a block was removed; names it."""
        pretrained.check_savable(self.state_dict())
        found = {listener.capture.find_again() for listener in self._listeners}
        if len(found) > 1:
            raise ValueError(f"blocks: expected the same in the transformer of each route, got {sorted(found)}")
        self.blocks = list(*found) or self.blocks
        self.selector_arguments |= self.selector.arguments  # as they are now
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        open_to_umask(Path(output_path), WEIGHTS)

    def get_config_dict(self) -> dict[str, Any]:
        """As in the library."""
        config = super().get_config_dict()
        return config if self.provenance is None else {**config, "provenance": self.provenance}

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> S2SentPooling:
        hub: dict[str, Any] = {"token": token, "cache_folder": cache_folder, "revision": revision}
        hub["local_files_only"] = local_files_only
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **hub)
        provenance = config.pop("provenance", None)
        folders.check_shapes(Path(model_name_or_path, subfolder), lambda: cls(**config))
        model = cls(**config)
        model.provenance = provenance
        model.selector.eval()  # like the encoder that transformers loads; trainers and encode set the mode they need
        state = cls.load_torch_weights(model_name_or_path, subfolder=subfolder, **hub)
        pretrained.check_state(absent.file_of(Path(model_name_or_path, subfolder)), state, model.state_dict())
        # Assigned, and not copied into what is there, each tensor keeps its dtype. Cloned, it no longer maps the file.
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        model._is_loaded = True
        return model


@without_bars
def load(path: str | os.PathLike[str], **options: Any) -> SentenceTransformer:
    """A SentenceTransformer with an S2SentPooling among its modules, without ``trust_remote_code``: only modules of
    sentence-transformers and of this package are loaded.

    Args:
        path: the folder of a saved one, or its id on the hub. Or the name of a shipped selector, or the folder of a
            selector that was trained on an encoder with frozen weights: then it stands behind its encoder.
        options: those of SentenceTransformer, and mean the same. With ``backend="onnx"`` ONNX Runtime computes the whole of a
            saved model, pooling included.

    Raises:
        ValueError: there is no such model, or one of its modules is of another package; names it. Or the backend is another, or
            cannot follow an option.
    """
    return sentences.load(S2SentPooling, path, **options)


def _encoder_of(transformer: nn.Module) -> nn.Module:
    return getattr(transformer, "auto_model", transformer)


def _transformers_before(pooling: S2SentPooling, model: nn.Module) -> list[nn.Module]:
    """The transformers of ``model`` that may be the last to run before ``pooling``: one, or one of each route of a Router."""
    found: list[nn.Module] = []

    def run(module: nn.Module, last: list[nn.Module]) -> list[nn.Module]:
        """The transformers that may have run last once ``module`` has."""
        if module is pooling:
            found.extend(last)
        elif isinstance(module, Router):
            last = [one for route in module.sub_modules.values() for one in run(route, last)]
        elif isinstance(module, nn.Sequential):
            for child in module:
                last = run(child, last)
        elif hasattr(module, "auto_model"):
            last = [module]
        return last

    run(model, [])
    return list(dict.fromkeys(found))


def _refuse_layers_apart(transformer: nn.Module | None) -> None:
    """A ValueError inside a loss that replaces the transformer by its layers, one after another, for a pooling of one layer."""
    if type(vars(transformer).get("forward")).__name__ == "TransformerDecorator":
        raise ValueError(
            "loss: expected one that runs the whole transformer, got AdaptiveLayerLoss or Matryoshka2dLoss. They train a pooling "
            "of one layer at each depth, for models that are cut there, and S2SentPooling needs all of its blocks. "
            "MatryoshkaLoss works; for a shorter model choose lower blocks"
        )


class _Follower:
    """What a listener calls: the module, which it does not keep alive."""

    def __init__(self, module: S2SentPooling) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> S2SentPooling | None:
        return self._module()

    def __call__(self, *args: Any) -> Kept | Stream | None:
        module = self._module()
        return None if module is None else module._stream(*args)

    def __getstate__(self) -> dict[str, Any]:
        module = self._module()
        own = [] if module is None else [one for one in module._listeners if one._consumer is self]
        return {"module": module, "listeners": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copied or loaded module follows the copied or loaded transformer."""
        module = state["module"]
        if module is None:
            self._module = lambda: None  # type: ignore[assignment]
            return
        self._module = weakref.ref(module)
        module._listeners += state["listeners"]


def _remove(listeners: list[BlockListener]) -> None:
    """And forget them, so that no transformer is kept alive."""
    while listeners:
        listeners.pop().remove()
