"""A model as the folder that existing servers take: Text Embeddings Inference (its ONNX Runtime backend) and NVIDIA Triton.

    export_folder(model, "served", tokenizer)

    model.onnx                       tokens to sentence embeddings
    1/model.onnx                     the same file once more, where Triton looks for version 1
    config.pbtxt                     Triton: inputs, output, batching
    config.json, tokenizer*.json     the encoder's; Text Embeddings Inference tokenizes by them
    1_Pooling/config.json            Text Embeddings Inference: take the only "token"
    sentence_bert_config.json        the number of tokens at which texts are truncated
    config_sentence_transformers.json   prompts, where the model has some

Embeddings are the output "sentence_embedding" [batch, D]. Releases of Text Embeddings Inference before 1.8 know token embeddings
only, and pool them: for these the output "last_hidden_state" [batch, 1, D] has the embedding in place of the first token.

The folder has no weights beside model.onnx. A server that finds an encoder's weights, as Text Embeddings Inference on a GPU,
would pool that encoder's last block by itself and return other vectors. Without weights it reports that they are missing.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import families, files
from .export import INPUTS, OUTPUT, Pipeline, as_pipeline, example, in_eval, write_onnx

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .transformers import S2SentModel

TOKENS = "last_hidden_state"
QUANTIZED = ("int8",)
LARGEST_BATCH = 64  # of requests that Triton puts together
# What Text Embeddings Inference reads from config.json under one of these names. Configurations that have another are given the
# first, as DistilBERT's with its "dim".
_READ = {"hidden_size": ("hidden_size", "n_embd"), "num_hidden_layers": ("num_hidden_layers", "n_layer")}


class Agreement(NamedTuple):
    """Cosines of quantised embeddings to float32's, over the sentences that this package ships."""

    mean: float
    lowest: float
    texts: int


def export_folder(
    model: S2SentModel | SentenceTransformer | Pipeline,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    quantize: str | None = None,
) -> Agreement | None:
    """Write ``model`` and ``tokenizer`` as a folder for servers, which appears once it is complete.

    Args:
        model: float32, in eval mode; as for ``export_onnx``.
        path: a folder that does not exist yet, or is empty.
        tokenizer: a fast one of transformers; None takes that of a SentenceTransformer.
        max_length: the number of tokens at which a server truncates texts, or fewer where tokenizer or encoder support fewer.
        quantize: "int8" quantises the weights of matrix products to int8, and their inputs as they come (dynamic quantisation of
            ONNX Runtime). None keeps float32.

    Returns:
        With ``quantize``, how far the embeddings moved.

    Raises:
        TypeError, ValueError: an argument is not as described; the number of tokens has no limit; the model's Transformer has
            options for its tokenizer's calls that servers do not follow; or see ``export_onnx``.
        ImportError: onnx, onnxscript or, to quantise, onnxruntime is missing; names the extra.
    """
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize: expected one of {', '.join(QUANTIZED)} or None, got {quantize!r}")
    pipeline = in_eval(as_pipeline(model))
    dtypes = {tensor.dtype for tensor in pipeline.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"model: expected float32, got {', '.join(sorted(map(str, dtypes)))}: see model.float()")
    tokenizer = _checked_tokenizer(pipeline.tokenizer if tokenizer is None else tokenizer)
    tokenizer.model_max_length = limit = _limit(pipeline.encoder, tokenizer, max_length, pipeline.own_limit())
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path: expected a folder that does not exist yet or is empty, got {str(path)!r}")
    with files.new_folder(target) as folder:
        agreement = _write_model(pipeline, tokenizer, folder, quantize)
        _write_configurations(pipeline, limit, folder)
        tokenizer.save_pretrained(folder)
    return agreement


class _Served(nn.Module):
    """The embedding, and the same as the only token of a sentence."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.training = pipeline.training

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.pipeline(input_ids, attention_mask)
        return embedding, embedding[:, None]


def _write_model(pipeline: Pipeline, tokenizer: Any, folder: Path, quantize: str | None) -> Agreement | None:
    agreement, path = None, folder / "model.onnx"
    write_onnx(_Served(pipeline), path, [OUTPUT, TOKENS])
    if quantize is not None:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            whole = Path(temporary)
            for file in folder.glob(f"{path.name}*"):
                file.rename(whole / file.name)
            agreement = _quantized(whole, path, tokenizer)
    (folder / "1").mkdir()
    for file in folder.glob("model.onnx*"):
        _link(file, folder / "1" / file.name)
    return agreement


def _quantized(whole: Path, path: Path, tokenizer: Any) -> Agreement:
    """Write ``path`` from the file of its name in ``whole``."""
    quantization = files.require("onnxruntime.quantization", "onnxruntime", "onnx")
    onnx = files.require("onnx", "onnx", "onnx")
    graph = onnx.load(whole / path.name)
    # The shapes that an exporter wrote beside the graph can contradict those that onnx infers, which refuses the model then.
    del graph.graph.value_info[:]
    quantization.quantize_dynamic(
        graph,
        path,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # 7 bits: products of 8 saturate in the 16-bit sums of CPUs without VNNI
        use_external_data_format=(whole / f"{path.name}.data").exists(),
    )
    return _agreement(whole / path.name, path, tokenizer)


def _link(file: Path, other: Path) -> None:
    """A second name for a file; a copy where the file system has none. A symbolic link would not do: ONNX Runtime refuses weights
    beside a model that lead out of its folder."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def _write_configurations(pipeline: Pipeline, limit: int, folder: Path) -> None:
    with torch.no_grad():
        size = pipeline(*example(pipeline)).shape[-1]
    encoder: Any = pipeline.encoder
    config = json.loads(encoder.config.to_json_string())
    config["architectures"] = [type(encoder).__name__]
    known = {"hidden_size": families.hidden_size(encoder), "num_hidden_layers": len(families.find_blocks(encoder))}
    for name, others in _READ.items():
        if not any(other in config for other in others):
            config[name] = known[name]
    config.setdefault("max_position_embeddings", limit)
    pooling = {
        "word_embedding_dimension": size,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "config.json", config)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    if prompts := {name: prompt for name, prompt in pipeline.prompts.items() if prompt}:
        _write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})
    (folder / "config.pbtxt").write_text(_triton(size), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _triton(size: int) -> str:
    inputs = ",\n".join(f'  {{ name: "{name}" data_type: TYPE_INT64 dims: [ -1 ] }}' for name in INPUTS)
    return f"""# The model's name is that of its folder. Requests of one length are put together.
backend: "onnxruntime"
max_batch_size: {LARGEST_BATCH}
input [
{inputs}
]
output [
  {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {size} ] }}
]
dynamic_batching {{ }}
"""


# ---------------------------------------------------------------- tokenizer


def _checked_tokenizer(tokenizer: Any) -> Any:
    """A copy without the padding and the truncation of its last call."""
    if tokenizer is None:
        raise ValueError("tokenizer: expected one beside a model that has none of its own, got None")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(
            f"tokenizer: expected a fast one, which servers read as tokenizer.json, got {type(tokenizer).__name__}"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _limit(encoder: nn.Module, tokenizer: Any, max_length: int | None, own: int | None = None) -> int:
    """Tokens after which a text is truncated."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected a positive number, got {max_length}")
    configured = getattr(encoder.config, "max_position_embeddings", None)
    limits = (max_length, tokenizer.model_max_length, families.positions(encoder), configured, own)
    limit = min(value for value in limits if value is not None and value > 0)
    if limit >= 2**31:  # of a tokenizer saved without a limit
        raise ValueError("max_length: expected a number for a tokenizer and an encoder without a limit, got None")
    return int(limit)


# ---------------------------------------------------------------- quantisation


def _agreement(whole: Path, quantised: Path, tokenizer: Any) -> Agreement:
    texts = shipped_sentences()
    one, other = (_embedded(path, tokenizer, texts) for path in (whole, quantised))
    cosines = torch.nn.functional.cosine_similarity(one, other)
    return Agreement(cosines.mean().item(), cosines.min().item(), len(texts))


def shipped_sentences() -> list[str]:
    """Those of the demo, without its comments and queries."""
    lines = (files.data_folder() / "sentences.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("# ", "? "))]


def _embedded(path: Path, tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """[S, D] by ONNX Runtime on the CPU."""
    runtime = files.require("onnxruntime", "onnxruntime", "onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for text in texts:
        batch = tokenizer([text], truncation=True, return_tensors="np")
        found.append(torch.from_numpy(session.run([OUTPUT], {name: batch[name] for name in INPUTS})[0]))
    return torch.cat(found)
