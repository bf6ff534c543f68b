"""A model as a file: ONNX, or a package of AOTInductor. Both hold the whole pipeline, from tokens to sentence embeddings, for any
batch and length.

    export_onnx(model, "model.onnx")    # PyTorch's own operators, for ONNX Runtime and others. Needs the extra onnx.
    export_aot(model, "model.pt2")      # compiled for this kind of machine. Needs a C++ compiler.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import pooling_modes, validate
from .capture import BlockCapture
from .files import require, scratch
from .formula.call import POOLINGS
from .selector import S2SentSelector

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .transformers import S2SentModel

# Options of a tokenizer's call which leave the tokens of a text as they are, and values of others that do.
_NO_OTHER_TOKENS = ("max_length", "padding", "pad_to_multiple_of", "return_tensors")
_USUAL = {"truncation": (True, "longest_first"), "add_special_tokens": (True,)}
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights: a protobuf message is limited to 2 GiB, graph included


class Pipeline(nn.Module):
    """An encoder, a selector behind its blocks, and the pooling: the module that is exported.

    Args:
        capture: the blocks of the encoder.
        selector: of as many blocks.
        pooling: as in S2SentSelector.pool.
        head: applied to the embedding, as that of S2SentModel.from_published, or modules behind an S2SentPooling.

    Attributes:
        tokenizer, prompts, tokenizing: those of the SentenceTransformer that it was made from, the last being the options of its
            Transformer's calls of its tokenizer; None and none otherwise. They are no part of what is exported.

    Raises:
        ValueError: the selector's N or D is not the capture's, or ``pooling`` is unknown.
    """

    def __init__(
        self, capture: BlockCapture, selector: S2SentSelector, pooling: str = "mean", head: nn.Module | None = None
    ) -> None:
        super().__init__()
        capture.check(selector)
        validate.option("pooling", pooling, POOLINGS)
        self.encoder, self.selector, self.pooling = capture.encoder, selector, pooling
        self.head, self.capture = head, capture
        # Kept alive, since the capture's hooks go with the module that made it; in a tuple, it is no part of this one.
        self.owners: tuple[nn.Module, ...] = ()
        self.tokenizer: Any = None
        self.prompts: dict[str, str] = {}
        self.tokenizing: dict[str, Any] = {}
        self.training = capture.encoder.training or selector.training

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """o [B, D] from int64 [B, L] and [B, L]."""
        states = self.capture.collect(input_ids=input_ids, attention_mask=attention_mask)
        embedding = self.selector.pool(states, attention_mask, pooling=self.pooling)  # one op for the whole selector
        return embedding if self.head is None else self.head(embedding)

    def own_limit(self) -> int | None:
        """The tokens at which its Transformer's own calls of the tokenizer truncate, for callers that call the tokenizer
        themselves.

        Raises:
            ValueError: another option changes a text's tokens; names it.
        """
        for option, value in self.tokenizing.items():
            if option not in _NO_OTHER_TOKENS and value not in _USUAL.get(option, ()):
                raise ValueError(
                    "model: expected a Transformer that tokenizes as its tokenizer does by itself, got processing_kwargs "
                    f"{option} = {value!r}: SentenceTransformer.encode follows them"
                )
        return self.tokenizing.get("max_length")


def export_onnx(model: S2SentModel | SentenceTransformer | Pipeline, path: str | os.PathLike[str]) -> None:
    """Write ``model`` as one ONNX file: ``input_ids`` and ``attention_mask``, int64 [batch, length], to
    ``sentence_embedding`` [batch, D] in the model's dtype. The file is checked, then moved to ``path``. Weights of about 2 GiB or
    more do not fit into it: they are written to ``path`` + ".data", which the file refers to by name.

    The selector becomes PyTorch's own operators, whichever backend "auto" would choose.

    Raises:
        TypeError, ValueError: the model is none of these or is in training mode, its selector names a backend other than the
            reference, or the exporter does not support its encoder.
        ImportError: onnx or onnxscript is missing; names the extra.
    """
    write_onnx(in_eval(as_pipeline(model)), path, [OUTPUT])


def write_onnx(module: nn.Module, path: str | os.PathLike[str], outputs: Sequence[str]) -> None:
    """``module`` of (input_ids, attention_mask) as one ONNX file, whose outputs have these names; see ``export_onnx``."""
    onnx = require("onnx", "onnx", "onnx")
    require("onnxscript", "onnxscript", "onnx")
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    names, same = {0: "batch", 1: "length"}, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                example(module),
                dynamo=True,
                dynamic_shapes=(names, same),
                input_names=INPUTS,
                output_names=outputs,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"model: cannot be exported to ONNX: {_root(error)}") from error
    assert program is not None  # None only if the exporter writes the file itself
    with _written_whole(Path(path), Path(path).name) as file:
        program.save(file, external_data=weights > ONNX_LIMIT)
        onnx.checker.check_model(file, full_check=True)


def export_aot(model: S2SentModel | SentenceTransformer | Pipeline, path: str | os.PathLike[str]) -> None:
    """Compile ``model`` ahead of time (torch.export, AOTInductor) into one file, and move it to ``path`` once it is complete:

        import s2sent_kernels                                   # registers the op that the package calls
        model = torch._inductor.aoti_load_package("model.pt2")
        embeddings = model(input_ids, attention_mask)           # int64 [B, L] and [B, L] to [B, D]

    The selector stays one op, of the backend chosen here: loading the file requires s2sent_kernels with that backend. With
    ``S2SentSelector(backend="reference")`` the selector is compiled along with the encoder, and loading requires torch alone.
    The file runs on the kind of device that the model is on. It does not check its inputs: for more tokens than the encoder has
    positions the result is undefined, so let the tokenizer truncate.

    Raises:
        TypeError, ValueError: the model is none of these, or is in training mode.
        RuntimeError: there is no C++ compiler, or torch.export does not support the encoder.
    """
    pipeline = in_eval(as_pipeline(model))
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(pipeline, example(pipeline), dynamic_shapes=(axes, axes))
    with _written_whole(Path(path), "model.pt2") as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file)


def as_pipeline(model: S2SentModel | SentenceTransformer | Pipeline) -> Pipeline:
    """The Pipeline of a model. A SentenceTransformer must consist of a Transformer, an S2SentPooling, and modules that change the
    embedding alone (Normalize, Dense, LayerNorm, Dropout). Prompts and truncation are not exported: the tokenizer applies them.

    Raises:
        TypeError, ValueError: the model is none of these; names its type or its modules.
    """
    if isinstance(model, Pipeline):
        return model
    if isinstance(model, nn.Sequential):
        pooling: Any = model[1] if len(model) > 1 else None
        if not getattr(pooling, "include_prompt", True):
            raise ValueError(
                "model: expected an S2SentPooling that includes prompts, got one with include_prompt=False"
            )
        return of_modules(model)
    from .transformers import S2SentModel

    if isinstance(model, S2SentModel):
        return Pipeline(model.capture, model.selector, model.config.pooling, model.head)
    raise TypeError(f"model: expected an S2SentModel, a SentenceTransformer or a Pipeline, got {type(model).__name__}")


class _Behind(nn.Module):
    """Modules of sentence-transformers behind an S2SentPooling, as a function of the embedding."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.behind = nn.ModuleList(modules)
        self.training = self.behind.training = any(module.training for module in modules)

    def forward(self, embedding: Tensor) -> Tensor:
        features = {OUTPUT: embedding}
        for module in self.behind:
            features = module(features)
        return features[OUTPUT]


def of_modules(model: Any) -> Pipeline:
    """The Pipeline of a SentenceTransformer, whose pooling may leave prompts out.

    Raises:
        ValueError: its modules are others.
    """
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm

    def changes_embedding(module: nn.Module) -> bool:
        if isinstance(module, Dense):
            return module.module_input_name == module.module_output_name == OUTPUT
        return isinstance(module, (Normalize, LayerNorm, Dropout))

    modules: list[Any] = list(model)
    pooling: Any = modules[1] if len(modules) > 1 else None
    behind = modules[2:]
    listener = getattr(pooling, "listener", None)  # an S2SentPooling's, once it is attached
    if listener is None or not hasattr(modules[0], "auto_model") or not all(map(changes_embedding, behind)):
        raise ValueError(
            "model: expected a Transformer, an S2SentPooling that is attached to it, and behind it modules that change the "
            "embedding alone (Normalize, Dense, LayerNorm, Dropout), "
            f"got {', '.join(type(module).__name__ for module in modules)}"
        )
    head = _Behind(behind) if behind else None
    single = pooling_modes.single(pooling_modes.parse(pooling.pooling))
    if single is None:
        raise ValueError(
            f"model: expected an S2SentPooling whose pooling is one of {POOLINGS}, got {pooling.pooling!r}"
        )
    pipeline = Pipeline(listener.capture, pooling.selector, single, head)
    pipeline.owners = (pooling,)
    pipeline.tokenizer, pipeline.prompts = model.tokenizer, model.prompts
    pipeline.tokenizing = dict((getattr(modules[0], "processing_kwargs", None) or {}).get("text") or {})
    return pipeline


def in_eval(pipeline: Pipeline) -> Pipeline:
    if any(module.training for module in pipeline.modules()):
        raise ValueError("model: expected it in eval mode, got it in training mode")
    return pipeline


def example(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs to trace with. The sizes differ from 1 and from each other, so that none is specialised. The tensors are distinct,
    because the same one twice would become a single input."""
    device = next(module.parameters()).device
    input_ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    return input_ids, torch.ones_like(input_ids)


def _root(error: BaseException) -> BaseException:
    """The cause of an exporter's error. The outer messages are advice to the exporter's developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _written_whole(path: Path, name: str) -> Iterator[str]:
    """A temporary path that ends in ``name``. At the end the file is moved to ``path``, after the ".data" it refers to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch(path.parent, path.name) as folder:
        file = os.path.join(folder, name)
        yield file
        if os.path.exists(f"{file}.data"):
            os.replace(f"{file}.data", f"{path}.data")
        os.replace(file, path)
