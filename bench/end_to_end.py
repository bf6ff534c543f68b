"""Section "end_to_end" of bench/suite.py: time and peak memory that the selector adds to an encoder with the mean of its last
block.

Encoders of three shapes with random weights (speed does not depend on them), in eval mode without gradients, on full masks. On a
GPU each variant is one CUDA graph, in bfloat16. An encoder under capture cannot read the mask's values, so it applies the mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from calls import free
from cases import Case
from contestants import make_selector
from formula import Formula, masked_mean
from memory import MIB, peak_bytes
from record import Row
from timing import capture, describe, device_times, on_gpu, wall_times
from torch import Tensor

from s2sent_kernels import S2SentSelector
from s2sent_kernels.capture import BlockCapture

BASE = "encoder + mean of last"
PUBLISHED, KEPT, FED = "+ published selector", "+ selector, states kept", "+ selector, block by block"
SHAPES = ((256, 128), (64, 32), (1, 32))


@dataclass(frozen=True)
class Encoder:
    name: str
    blocks: int
    size: int
    heads: int
    inner: int
    vocabulary: int = 30522

    def build(self, device: str, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.size,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            attn_implementation="sdpa",
        )
        return BertModel(config, add_pooling_layer=False).to(device=device, dtype=dtype).eval()


ENCODERS = (
    Encoder("BERT-base", 12, 768, 12, 3072),
    Encoder("BERT-large", 24, 1024, 16, 4096),
    Encoder("MiniLM-L6", 6, 384, 12, 1536),
)


def plan(device: str) -> list[tuple[Encoder, tuple[tuple[int, int], ...]]]:
    """Encoders with their B x L; on a CPU the smallest, on a small batch."""
    if device == "cuda":
        return [(encoder, SHAPES) for encoder in ENCODERS]
    return [(ENCODERS[2], ((8, 32), (1, 32)))]


class Variants:
    """Four ways to sentence embeddings, on one encoder and batch. ``close`` removes the encoder's hooks."""

    def __init__(self, encoder: torch.nn.Module, shape: Encoder, batch: int, tokens: int, device: str) -> None:
        dtype = next(encoder.parameters()).dtype
        case = Case("", batch, tokens, shape.blocks, shape.size, dtype)
        self.encoder = encoder
        self.selector = make_selector(case, device)
        self.published = Formula(make_selector(case, device, "official", backend="reference"), tokens)
        self.capture = BlockCapture(encoder)
        self.ids = torch.randint(0, shape.vocabulary, (batch, tokens)).to(device)
        self.mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
        self.encoder_mask: Tensor | None = self.mask

    def close(self) -> None:
        self.capture.remove()

    def _states(self) -> list[Tensor]:
        output = self.encoder(input_ids=self.ids, attention_mask=self.encoder_mask, output_hidden_states=True)
        return list(output.hidden_states)

    def base(self) -> Tensor:
        output = self.encoder(input_ids=self.ids, attention_mask=self.encoder_mask)
        return masked_mean(output.last_hidden_state, self.mask)

    def with_published(self) -> Tensor:
        states = self._states()
        wanted = self.selector.published_blocks(len(states), self.selector.num_blocks)
        return self.published.pooled([states[n] for n in wanted], self.mask)

    def kept(self) -> Tensor:
        return self.selector.pool(self._states()[1:], self.mask)

    def fed(self) -> Tensor:
        return self.capture.pool(self.selector, input_ids=self.ids, attention_mask=self.encoder_mask)

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {BASE: self.base, PUBLISHED: self.with_published, KEPT: self.kept, FED: self.fed}

    def prepare(self) -> str:
        """Warm up with padding: outside of a capture, an encoder that sees a full mask switches to another attention.
        If a capture with a mask fails, the encoder gets no mask, and the returned note tells the rows."""
        if not on_gpu():
            return ""
        try:
            self.mask[0, -1] = 0
            for call in self.calls().values():
                call()
            self.mask.fill_(1)
            capture([self.base])
        except Exception as error:
            self.mask.fill_(1)
            self.encoder_mask = None
            return f"encoder without a mask: {describe(error)}"
        return ""

    def parity(self) -> dict[str, Row]:
        """Both of this package's variants against the reference in float64, on the same hidden states."""
        states = self._states()[1:]
        return {
            name: embeddings_parity(self.selector, states, self.mask, call())
            for name, call in ((KEPT, self.kept), (FED, self.fed))
        }


def embeddings_parity(selector: S2SentSelector, states: list[Tensor], mask: Tensor, found: Tensor) -> dict[str, Any]:
    """Sentence embeddings against the reference in float64, on the same hidden states."""
    reference = copy.deepcopy(selector)
    reference.backend = "reference"
    same_dtype = reference.pool(states, mask).double()
    truth = reference.double().pool([state.double() for state in states], mask)
    unit = torch.finfo(states[0].dtype).eps / 2
    error, yardstick = (found.double() - truth).norm(), (same_dtype - truth).norm()
    ok = bool(error <= 2 * yardstick + unit * truth.norm())
    relative = (error / truth.norm()).item()
    return {"ok": ok, "output_error": relative, "yardstick_error": (yardstick / truth.norm()).item()}


def measure(device: str, repeats: int, say: Callable[[str], None] = print) -> Iterator[list[Row]]:
    """The rows of one encoder and batch at a time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape, batches in plan(device):
        encoder = shape.build(device, dtype)
        for batch, tokens in batches:
            say(f"{shape.name} {batch} x {tokens}")
            with torch.no_grad():
                yield _measure(encoder, shape, batch, tokens, device, repeats)
            free()
        del encoder
        free()


def _measure(encoder: torch.nn.Module, shape: Encoder, batch: int, tokens: int, device: str, repeats: int) -> list[Row]:
    variants = Variants(encoder, shape, batch, tokens, device)
    try:
        rows: dict[str, Row] = {}
        note = variants.prepare()
        outcomes = variants.parity()
        for name in variants.calls():
            row = {
                "section": "end to end",
                "case": f"{batch}x{tokens}",
                "what": shape.name,
                "mode": "forward",
                "contestant": name,
                "shape": [batch, tokens, shape.blocks, shape.size],
                "dtype": str(next(encoder.parameters()).dtype).removeprefix("torch."),
            }
            if name in outcomes:
                row["parity"] = outcomes[name]
                if not outcomes[name]["ok"]:
                    row["status"] = "parity failed"
            rows[name] = row | ({"note": note} if note else {})
        running = {name: call for name, call in variants.calls().items() if "status" not in rows[name]}
        errors: dict[str, str] = {}
        device_us = device_times({n: [c] for n, c in running.items()}, repeats, seconds=8.0, errors=errors)
        for name, why in errors.items():
            rows[name] |= {"status": "error", "note": why}
            del running[name]
        wall_us = wall_times(running, min(repeats, 20), seconds=4.0) if on_gpu() else {}
        there = [variants.ids, variants.mask, *encoder.parameters(), *encoder.buffers()]
        there += [*variants.selector.parameters(), *variants.published.parameters(), *variants.published.buffers()]
        for name, call in running.items():
            peak = peak_bytes(call, there)
            rows[name] |= {"status": "ok", "device_us": device_us[name].as_dict(), "peak_mib": peak / MIB}
            if name in wall_us:
                rows[name]["wall_us"] = wall_us[name].as_dict()
        base = rows[BASE]
        for name, row in rows.items():
            if row["status"] == "ok" and name != BASE and base["status"] == "ok":
                row["overhead"] = row["device_us"]["median"] / base["device_us"]["median"] - 1
                row["peak_overhead"] = row["peak_mib"] / base["peak_mib"] - 1
        return list(rows.values())
    finally:
        variants.close()
