"""Eager calls of an encoder with its sentence embeddings, and of SentenceTransformer.encode: the selector beside the mean of the
last block. Encoders with random weights (speed does not depend on them), in eval mode, without gradients, on full masks.

The encoder with the mean is one of its own, without the capture's hooks.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from calls import free
from cases import BOTTLENECK, FREQUENCIES, Case
from contestants import make_selector
from end_to_end import BASE, ENCODERS, KEPT, Encoder, embeddings_parity
from formula import masked_mean
from memory import MIB, peak_bytes
from record import Row
from timing import describe, host_times, on_gpu, wall_times
from torch import Tensor, nn

from s2sent_kernels.capture import BlockCapture

if TYPE_CHECKING:
    from latency import Settings

POOLING = "Pooling"
SECONDS = 3.0  # limit for the rounds of one batch, all contestants together
CALLS = 5  # of a row: some 200 kernels each, and a launch queue holds about a thousand


def captured(backend: str) -> str:
    return f"+ capture.pool, {backend}"


def pooled_by(backend: str) -> str:
    return f"S2SentPooling, {backend}"


def plan(device: str) -> tuple[Encoder, tuple[tuple[int, int], ...]]:
    """The encoder and its B x L."""
    if device == "cuda":
        return ENCODERS[0], ((1, 32), (8, 64), (64, 32), (256, 128))
    return ENCODERS[2], ((1, 32), (32, 32))


def encode_plan(device: str) -> tuple[Encoder, tuple[int, ...]]:
    """The encoder, and how many sentences one encode takes, in batches of 32."""
    return ENCODERS[2], (1, 128) if device == "cuda" else (1, 32)


def steps(device: str) -> int:
    return len(plan(device)[1]) + len(encode_plan(device)[1])


def measure(names: list[str], settings: Settings, say: Callable[[str], None]) -> Iterator[list[Row]]:
    shape, batches = plan(settings.device)
    variants = _Variants(shape, names, settings.device)
    for batch, tokens in batches:
        say(f"caller {shape.name} {batch} x {tokens}")
        with torch.no_grad():
            yield variants.rows(batch, tokens, settings)
        free()
    del variants
    free()
    shape, counts = encode_plan(settings.device)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        models = _models(shape, names, settings.device, Path(folder))
        for count in counts:
            say(f"caller encode {count}")
            yield _encode_rows(models, shape, count, settings)


def row_of(shape: Encoder, case: str, what: str, name: str, dtype: torch.dtype, mode: str = "forward") -> Row:
    return {
        "section": "caller", "case": case, "what": what, "mode": mode, "contestant": name,
        "shape": [shape.blocks, shape.size], "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def add_overheads(rows: dict[str, Row], base: str) -> None:
    """The ratios to ``base`` less 1, of one call's wall time and of peak memory."""
    for name, row in rows.items():
        if name != base and row["status"] == "ok" and rows[base]["status"] == "ok":
            row["overhead"] = row["wall_us"]["median"] / rows[base]["wall_us"]["median"] - 1
            if "peak_mib" in row:
                row["peak_overhead"] = row["peak_mib"] / rows[base]["peak_mib"] - 1


# ---------------------------------------------------------------- encoder and pooling


class _Variants:
    """The ways to sentence embeddings, on one encoder."""

    def __init__(self, shape: Encoder, names: list[str], device: str) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.encoder = shape.build(device, self.dtype)
        self.hooked = copy.deepcopy(self.encoder)
        self.capture = BlockCapture(self.hooked)
        case = Case("", 1, 1, shape.blocks, shape.size, self.dtype)
        self.selectors = {name: make_selector(case, device, backend=name) for name in names}

    def calls(self, ids: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
        def base() -> Tensor:
            return masked_mean(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

        def kept() -> Tensor:
            output = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            return self.selectors["auto"].pool(output.hidden_states[1:], mask)

        return {BASE: base, KEPT: kept} | {
            captured(name): partial(self.capture.pool, selector, input_ids=ids, attention_mask=mask)
            for name, selector in self.selectors.items()
        }

    def rows(self, batch: int, tokens: int, settings: Settings) -> list[Row]:
        ids = torch.randint(0, self.shape.vocabulary, (batch, tokens)).to(self.device)
        mask = torch.ones(batch, tokens, dtype=torch.long, device=self.device)
        calls = self.calls(ids, mask)
        states = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        rows: dict[str, Row] = {}
        for name, call in calls.items():
            rows[name] = row_of(self.shape, f"{batch}x{tokens}", self.shape.name, name, self.dtype)
            try:
                found = call()
                if name != BASE:
                    rows[name] |= _judged(embeddings_parity(self.selectors["auto"], list(states), mask, found))
            except Exception as error:
                rows[name] |= {"status": "error", "note": describe(error)}
        del states
        there = [ids, mask]
        for module in (self.encoder, self.hooked, *self.selectors.values()):
            there += [*module.parameters(), *module.buffers()]
        _time(calls, rows, settings)
        for name in rows:
            if rows[name]["status"] == "ok":
                rows[name]["peak_mib"] = peak_bytes(calls[name], there) / MIB
        add_overheads(rows, BASE)
        return list(rows.values())


def _judged(outcome: dict[str, Any]) -> Row:
    return {"parity": outcome} | ({} if outcome["ok"] else {"status": "parity failed"})


def _time(calls: dict[str, Callable[[], Any]], rows: dict[str, Row], settings: Settings) -> None:
    running = {name: call for name, call in calls.items() if "status" not in rows[name]}
    wall = wall_times(running, settings.repeats, seconds=SECONDS)
    host = {}
    if on_gpu():
        host = host_times({n: (c, CALLS) for n, c in running.items()}, settings.repeats, seconds=SECONDS / 2)
    for name in running:
        rows[name] |= {"status": "ok", "wall_us": wall[name].as_dict()}
        if name in host:
            rows[name]["host_us"] = host[name].as_dict()


# ---------------------------------------------------------------- SentenceTransformer.encode

WORDS = 1000


def sentences(count: int) -> list[str]:
    """8 to 24 words each, the same ones in every run."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(8, 24))) for _ in range(count)]


def _write_encoder(shape: Encoder, folder: Path) -> None:
    """A random encoder and a tokenizer of whole words, as sentence-transformers loads them."""
    import tokenizers
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(
        folder
    )
    shape.build("cpu", torch.float32).save_pretrained(folder)


def _models(shape: Encoder, names: list[str], device: str, folder: Path) -> dict[str, Any]:
    """A SentenceTransformer of each pooling; empty where the package is not installed. Each has an encoder of its own, since
    S2SentPooling follows its encoder by hooks."""
    with suppress(ImportError):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
        from transformers.utils import logging

        from s2sent_kernels.sentence_transformers import S2SentPooling

        # Loading reports the pooler's weights, which nothing reads here, as missing.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        _write_encoder(shape, folder)

        def model(pooling: Callable[[nn.Module], nn.Module]) -> SentenceTransformer:
            transformer = Transformer(str(folder))
            modules = [transformer, pooling(transformer)]
            whole = SentenceTransformer(modules=modules, device=device).eval()
            if device == "cuda":
                transformer.to(torch.bfloat16)
            return whole

        models: dict[str, Any] = {POOLING: model(lambda _: Pooling(shape.size))}
        options = {"bottleneck": BOTTLENECK, "frequencies": min(FREQUENCIES, shape.blocks), "block_prior": True}
        for name in names:
            models[pooled_by(name)] = model(
                lambda each, name=name: S2SentPooling.behind(each, blocks=None, backend=name, **options)
            )
        return models
    return {}


def _encode_parity(model: Any, text: str, device: str) -> dict[str, Any]:
    """One sentence's embedding, on the hidden states of the same encoder."""
    features = {name: value.to(device) for name, value in model.preprocess([text]).items() if isinstance(value, Tensor)}
    with torch.no_grad():
        encoder = model[0].auto_model
        output = encoder(
            **{name: features[name] for name in ("input_ids", "attention_mask")}, output_hidden_states=True
        )
        found = model.encode(text, convert_to_tensor=True, show_progress_bar=False)[None].clone()
        return embeddings_parity(model[1].selector, list(output.hidden_states[1:]), features["attention_mask"], found)


def _encode_rows(models: dict[str, Any], shape: Encoder, count: int, settings: Settings) -> list[Row]:
    texts: Any = sentences(count)
    calls = {
        name: partial(model.encode, texts[0] if count == 1 else texts, batch_size=32, show_progress_bar=False)
        for name, model in models.items()
    }
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    rows = {name: row_of(shape, str(count), "encode", name, dtype) for name in models}
    for name, call in calls.items():
        try:
            call()
            if name != POOLING:
                rows[name] |= _judged(_encode_parity(models[name], texts[0], settings.device))
        except Exception as error:
            rows[name] |= {"status": "error", "note": describe(error)}
    running = {name: call for name, call in calls.items() if "status" not in rows[name]}
    wall = wall_times(running, settings.repeats, seconds=SECONDS)
    for name, times in wall.items():
        rows[name] |= {"status": "ok", "wall_us": times.as_dict()}
    if rows:
        add_overheads(rows, POOLING)
    return list(rows.values())
