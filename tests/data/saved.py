"""What is computed with each file of this folder: ``write.py`` records it, ``test_saved_files.py`` compares it with the record.

Only public import paths are used, since the files outlive the modules' places. Outputs whose name has "native" in it follow from
stored hidden states through compiled kernels alone, which give the same bits on every processor.
"""

from __future__ import annotations

import pickle
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
TEXTS = ["the cat sat on the mat", "a dog ran", "moon", "the old moon is bright"]
N, D = 3, 16
BACKENDS = ("native", "reference")


def environment() -> dict[str, str]:
    """What the bits of an encoder and of plain PyTorch depend on beside the code of this package."""
    import sentence_transformers
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": f"{platform.machine()} {model} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
    }


class WordTokenizer:
    """One token a word. A cache's name depends on the class's name and the vocabulary."""

    model_max_length = 16

    def get_vocab(self) -> dict[str, int]:
        words = sorted({word for text in TEXTS for word in text.split()})
        return {word: index + 4 for index, word in enumerate(words)}


def inputs() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(FOLDER / "inputs.safetensors")


def states() -> tuple[list[Tensor], Tensor]:
    """Hidden states [B, L, D] and their mask."""
    given = inputs()
    return [given[f"hidden_state_{n}"] for n in range(N)], given["attention_mask"]


def tokens() -> dict[str, Tensor]:
    given = inputs()
    return {"input_ids": given["input_ids"], "attention_mask": given["token_mask"]}


def of_selector(selector: Any) -> dict[str, Tensor]:
    """Every output of a selector that is its own, from the stored hidden states."""
    hidden_states, mask = states()
    real = mask.bool()
    packed = [state[real] for state in hidden_states]
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    found = {}
    for backend in BACKENDS:
        selector.backend = backend
        label = backend if selector.profile == "paper" else f"official by {backend}"  # whose gate is plain PyTorch
        found[f"{label} tokens"] = selector(hidden_states, mask)
        found[f"{label} gates"] = selector.gates(hidden_states, mask)
        for pooling in ("mean", "cls", "last"):
            found[f"{label} {pooling}"] = selector.pool(hidden_states, mask, pooling=pooling)
        if selector.profile == "paper":  # the other has no packed form
            found[f"{label} packed"] = selector.pool(packed, cu_seqlens=ends)
        pool = selector.blockwise(mask)
        for block, state in enumerate(hidden_states):
            pool.add(block, state)
        found[f"{label} block by block"] = pool.result()
    return found


# ---------------------------------------------------------------- the files


def selector_folder() -> dict[str, Tensor]:
    from s2sent_kernels import S2SentSelector

    return of_selector(S2SentSelector.from_pretrained(FOLDER / "selector"))


def trained_selector_folder() -> dict[str, Tensor]:
    """With what training records beside the selector."""
    from s2sent_kernels import S2SentSelector

    return of_selector(S2SentSelector.from_pretrained(FOLDER / "trained"))


def selector_torch_save() -> dict[str, Tensor]:
    return of_selector(torch.load(FOLDER / "selector.pt", weights_only=False))


def selector_pickle() -> dict[str, Tensor]:
    return of_selector(pickle.loads((FOLDER / "selector.pkl").read_bytes()))


def pooling_module(pooling: Any) -> dict[str, Tensor]:
    return {**of_selector(pooling.selector), "blocks": torch.tensor(pooling.blocks)}


def pooling_torch_save() -> dict[str, Tensor]:
    pooling = torch.load(FOLDER / "pooling.pt", weights_only=False)
    assert (pooling.pooling, pooling.block_norm, pooling.include_prompt) == ("cls", "layernorm", False)
    return pooling_module(pooling)


def pooling_pickle() -> dict[str, Tensor]:
    return pooling_module(pickle.loads((FOLDER / "pooling.pkl").read_bytes()))


def sentence_transformer_folder() -> dict[str, Tensor]:
    from s2sent_kernels.sentence_transformers import load

    model = load(FOLDER / "sentence_transformer", device="cpu")
    found = pooling_module(model[1])
    for backend in BACKENDS:
        model[1].selector.backend = backend
        found[f"embeddings by {backend}"] = model.encode(TEXTS, convert_to_tensor=True)
    return found


def model_folder() -> dict[str, Tensor]:
    from s2sent_kernels.transformers import S2SentModel

    model = S2SentModel.from_pretrained(FOLDER / "model")
    assert not model.training
    found = of_selector(model.selector)
    for backend in BACKENDS:
        model.selector.backend = backend
        output = model(**tokens(), output_tokens=True, output_gates=True)
        for name in ("embedding", "tokens", "gates"):
            found[f"{name} by {backend}"] = output[name]
    return found


def classifier_folder() -> dict[str, Tensor]:
    from s2sent_kernels.transformers import S2SentForSequenceClassification

    model = S2SentForSequenceClassification.from_pretrained(FOLDER / "classifier")
    found = of_selector(model.model.selector)
    for backend in BACKENDS:
        model.model.selector.backend = backend
        output = model(**tokens(), labels=torch.tensor([0, 2, 1, 1]))
        found |= {f"logits by {backend}": output.logits, f"loss by {backend}": output.loss}
    return found


def of_encoder(encoder: nn.Module) -> dict[str, Tensor]:
    return {"output": encoder(states()[0][0])}


def encoder_with_capture() -> dict[str, Tensor]:
    """The encoder alone, whose hooks find no capture that listens; and another capture on it."""
    from s2sent_kernels.capture import BlockCapture

    encoder = torch.load(FOLDER / "encoder.pt", weights_only=False)
    assert sum(len(layer._forward_hooks) for layer in encoder.layers) == 2
    found = of_encoder(encoder)
    with BlockCapture(encoder) as capture:
        found |= {f"block {n}": state for n, state in enumerate(capture.collect(src=states()[0][0]))}
    return found


def capture_with_encoder() -> dict[str, Tensor]:
    capture = torch.load(FOLDER / "capture.pt", weights_only=False)
    assert capture.blocks == (0, 2) and capture.block_norm == "final"
    selector = torch.load(FOLDER / "selector_of_2.pt", weights_only=False)
    selector.backend = "reference"
    source = states()[0][0]
    found = {f"block {n}": state for n, state in zip(capture.blocks, capture.collect(src=source), strict=True)}
    collected = capture.collect(src=source)
    capture.remove()
    assert not any(layer._forward_hooks for layer in capture.encoder.layers)
    return {**found, "pooled": selector.pool(collected), **of_encoder(capture.encoder)}


def listener_with_encoder() -> dict[str, Tensor]:
    listener = torch.load(FOLDER / "listener.pt", weights_only=False)
    found = of_encoder(listener.encoder)
    found |= {f"block {n}": state for n, state in zip(listener.blocks, listener.take(), strict=True)}
    listener.remove()
    return found


def cache_folder() -> dict[str, Tensor]:
    """Found by its settings, texts and encoder, and opened without a run of the encoder."""
    from s2sent_kernels import cache
    from s2sent_kernels.transformers import S2SentModel

    encoder, folder = S2SentModel.from_pretrained(FOLDER / "model").encoder, FOLDER / "cache"
    (name,) = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    found = {}
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)  # a lock is written beside it
        encoder.register_forward_pre_hook(_refuse_to_run)
        made = cache.make(encoder, WordTokenizer(), TEXTS, copy, SETTINGS())
        assert made.folder.name == name and made.blocks == (1, 2, 3)
        rows = made.rows(TEXTS[::-1])
        for num_blocks, frequencies in ((1, 1), (2, 4), (3, 8)):
            found[f"f of {num_blocks}, {frequencies}"] = made.squeezed(num_blocks, frequencies, rows)
            found[f"p of {num_blocks}"] = made.pooled(num_blocks).clone()
    return found


def SETTINGS() -> Any:
    from s2sent_kernels import cache

    return cache.Settings(blocks="last:3", token_frequencies=3, pooling="cls", max_length=8, batch_size=2)


def _refuse_to_run(*_: Any) -> None:
    raise AssertionError("the encoder ran")


def exported_program(backend: str) -> dict[str, Tensor]:
    """A graph that holds every op."""
    import s2sent_kernels  # noqa: F401, registers the ops

    program = torch.export.load(FOLDER / f"ops_{backend}.pt2")
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"s2sent.{name}.default" for name in OPS} <= targets
    hidden_states, mask = states()
    found = program.module()(*hidden_states, mask)
    return {f"{backend} {name}": tensor for name, tensor in zip(OP_OUTPUTS, found, strict=True)}


def exported_native() -> dict[str, Tensor]:
    return exported_program("native")


def exported_reference() -> dict[str, Tensor]:
    return exported_program("reference")


OPS = (
    "squeeze", "squeeze_backward", "squeeze_block", "gate", "gate_backward", "gate_pool_backward", "fuse", "fuse_backward",
    "select_pool", "select",
)  # fmt: skip
OP_OUTPUTS = (
    "f", "p", "o of select_pool", "f of select_pool", "p of select_pool", "v of select", "f of select", "g of select", "g", "v",
    "dg", "du_0", "du_1", "du_2", "sums", "p of blocks",
    *(f"{op} {n}" for op in ("gate_backward", "gate_pool_backward") for n in range(3)),
)  # fmt: skip
CASES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "selector folder": selector_folder,
    "trained selector folder": trained_selector_folder,
    "selector, torch.save": selector_torch_save,
    "selector, pickle": selector_pickle,
    "S2SentPooling, torch.save": pooling_torch_save,
    "S2SentPooling, pickle": pooling_pickle,
    "SentenceTransformer folder": sentence_transformer_folder,
    "S2SentModel folder": model_folder,
    "S2SentForSequenceClassification folder": classifier_folder,
    "encoder under a BlockCapture": encoder_with_capture,
    "BlockCapture": capture_with_encoder,
    "BlockListener": listener_with_encoder,
    "cache folder": cache_folder,
    "exported program, native": exported_native,
    "exported program, reference": exported_reference,
}
