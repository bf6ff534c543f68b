"""backend="onnx" of ``sentence_transformers.load``: a whole SentenceTransformer computed by ONNX Runtime, but for the tokenizer.

The library's own ONNX backend computes the encoder alone, and shows no block of it. Here one graph takes tokens to embeddings, as
``export_onnx`` writes it, and stands in the place of the encoder. Prompts, truncation and encode remain the library's.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .export import INPUTS, OUTPUT, as_pipeline, export_onnx
from .files import first_line, require

FILE = "onnx/model.onnx"  # where sentence-transformers keeps one
# Those of model_kwargs that tell what ONNX Runtime does; the names are the library's.
OPTIONS = ("file_name", "export", "provider", "provider_options", "session_options")
REMEDY = "export the model again, unless one of the options is wrong"
DTYPES = (torch.float32, torch.float16)  # in which ONNX Runtime computes every operator of an encoder


class Graph(nn.Module):
    """A graph in ONNX Runtime, called as an encoder is.

    Args:
        path: a graph of ``export_onnx`` or ``servers.export_folder``.
        config: the encoder's.
        provider: None takes the first that is available.

    Raises:
        ValueError: ONNX Runtime has no such provider here; it cannot load the file, which the error names, as when it is damaged;
            or the graph has no sentence embeddings among its outputs, which the error names.
    """

    def __init__(
        self, path: Path, config: Any, provider: str | None, provider_options: Any = None, session_options: Any = None
    ) -> None:
        super().__init__()
        runtime = require("onnxruntime", "onnxruntime", "onnx")
        there = runtime.get_available_providers()
        if provider is not None and provider not in there:  # ONNX Runtime would take another one
            raise ValueError(f"provider: expected one of {', '.join(there)}, got {provider!r}")
        of_provider = None if provider_options is None else [provider_options]
        try:
            self.session = runtime.InferenceSession(
                path, session_options, providers=[provider or there[0]], provider_options=of_provider
            )
        except Exception as error:  # of classes of the library's own that it does not document
            raise ValueError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}: {REMEDY}") from error
        outputs = {output.name: output for output in self.session.get_outputs()}
        if OUTPUT not in outputs:
            raise ValueError(f"{path}: expected a graph with the output {OUTPUT}, got {', '.join(outputs)}")
        self.config = copy.deepcopy(config)
        self.config.hidden_size = outputs[OUTPUT].shape[-1]  # which is what the library asks for

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """o [B, D] from int64 [B, L] and [B, L], on their device.

        Raises:
            ValueError: a token's type is not 0, as in pairs of texts: the graph has no such input.
        """
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("token_type_ids: expected 0 for every token with backend='onnx', got pairs of texts")
        given = zip(INPUTS, (input_ids, attention_mask), strict=True)
        (found,) = self.session.run([OUTPUT], {name: tensor.cpu().numpy() for name, tensor in given})
        return {OUTPUT: torch.from_numpy(found).to(input_ids.device)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        """With the same session, which does not change and may be run by several threads."""
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        other.session, other.config = self.session, copy.deepcopy(self.config, memo)
        return other.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a model that ONNX Runtime computes cannot be pickled: load it in each process")

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "model: expected one of PyTorch to save, got one of ONNX Runtime: see export_onnx and export_folder"
        )


def _refuse_to_change(include_prompt: bool) -> None:
    raise ValueError(
        f"include_prompt: expected the graph's own with backend='onnx', got {include_prompt}: set it on the model to export"
    )


def find(folder: Path, options: Mapping[str, Any], others: Mapping[str, Mapping[str, Any] | None]) -> Path | None:
    """The graph that is computed: ``file_name`` (by default FILE) below the folder, if it is there and ``export`` does not ask
    for another; else None, and one is exported, which takes some seconds.

    Args:
        options: those of OPTIONS.
        others: by the names of load's arguments, the options of the encoder, which a graph that is there does not follow.

    Raises:
        ValueError: ``file_name`` is given and not there; or the graph is there, and so are others.
    """
    file = folder / (options.get("file_name") or FILE)
    if options.get("export"):
        return None
    if not file.is_file():
        if options.get("file_name"):
            raise ValueError(f"file_name: expected a file in {folder}, got {options['file_name']!r}")
        return None
    for argument, values in others.items():
        if values:
            raise ValueError(
                f"{argument}: expected none that change the encoder beside the graph {file}, got {', '.join(values)}; with "
                "model_kwargs={'export': True} another graph is made"
            )
    return file


def compute_by_runtime(model: Any, file: Path | None, options: Mapping[str, Any]) -> None:
    """Let ONNX Runtime compute ``model``, a SentenceTransformer.

    Args:
        file: its graph; None exports one.
        options: those of OPTIONS.

    Raises:
        ValueError: ONNX Runtime cannot compute in the encoder's dtype; or see ``export_onnx`` and Graph.
    """
    rest = [options.get(name) for name in ("provider", "provider_options", "session_options")]
    as_pipeline(model)  # a Router, say, is refused here
    config = model[0].auto_model.config
    dtype = families.float_parameter(model[0].auto_model).dtype
    if file is None and dtype not in DTYPES:
        raise ValueError(
            f"dtype: expected {' or '.join(map(str, DTYPES))} with backend='onnx', got {dtype}: see model_kwargs"
        )
    with tempfile.TemporaryDirectory() as temporary:
        if file is None:
            file = Path(temporary) / "model.onnx"
            export_onnx(model.eval(), file)
        graph = Graph(file, config, *rest)
    transformer = model[0]
    transformer.model, transformer.backend, model.backend = graph, "onnx", "onnx"
    transformer.modality_config = {"text": {"method": "forward", "method_output_name": OUTPUT}}
    transformer.module_output_name = OUTPUT
    del model[1:]  # they are in the graph
    model.set_pooling_include_prompt = _refuse_to_change
