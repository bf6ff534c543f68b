"""A training step of an encoder, its pooling, a contrastive loss and an optimizer: the selector beside the mean of the last
block.

    64 pairs of texts of 32 tokens, each text encoded in training mode under bfloat16 autocast; InfoNCE over the batch (its
    temperature 0.05), backward, AdamW over the encoder and the selector

Random weights and texts: speed does not depend on them. It needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from caller_encoder import add_overheads, captured, row_of
from calls import free
from cases import Case
from contestants import make_selector
from end_to_end import BASE, ENCODERS, Encoder
from formula import masked_mean
from memory import MIB, peak_bytes
from record import Row
from timing import describe, wall_times
from torch import Tensor, nn

from s2sent_kernels.capture import BlockCapture

if TYPE_CHECKING:
    from latency import Settings

WHAT = "training step"
TEMPERATURE = 0.05
SECONDS = 6.0  # limit for the rounds, all contestants together


def plan(device: str) -> list[tuple[Encoder, int, int]]:
    """Encoders, with B and L."""
    return [(ENCODERS[0], 64, 32)] if device == "cuda" else []


def steps(device: str) -> int:
    return len(plan(device))


class Step:
    """One model that is trained. ``backend`` None pools by the mean of the last block."""

    def __init__(self, shape: Encoder, batch: int, tokens: int, device: str, backend: str | None) -> None:
        self.device = device
        self.encoder = shape.build(device, torch.float32).train()
        parameters: list[nn.Parameter] = list(self.encoder.parameters())
        self.selector = None
        if backend is not None:
            case = Case("", batch, tokens, shape.blocks, shape.size)
            self.selector = make_selector(case, device, backend=backend).train()
            self.capture = BlockCapture(self.encoder)
            parameters += self.selector.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        generator = torch.Generator().manual_seed(0)
        self.pairs = torch.randint(0, shape.vocabulary, (2, batch, tokens), generator=generator).to(device)
        self.mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
        self.labels = torch.arange(batch, device=device)

    def embed(self, ids: Tensor) -> Tensor:
        if self.selector is not None:
            return self.capture.pool(self.selector, input_ids=ids, attention_mask=self.mask)
        return masked_mean(self.encoder(input_ids=ids, attention_mask=self.mask).last_hidden_state, self.mask)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            anchors, positives = (F.normalize(self.embed(ids).float(), dim=-1) for ids in self.pairs)
            loss = F.cross_entropy(anchors @ positives.T / TEMPERATURE, self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        state = [
            value for each in self.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)
        ]
        modules = [self.encoder] if self.selector is None else [self.encoder, self.selector]
        there = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return [*there, *state, self.pairs, self.mask, self.labels]


def measure(names: list[str], settings: Settings, say: Callable[[str], None]) -> Iterator[list[Row]]:
    for shape, batch, tokens in plan(settings.device):
        say(f"caller {WHAT} {shape.name} {batch} x {tokens}")
        yield _measure(shape, batch, tokens, names, settings)
        free()


def _measure(shape: Encoder, batch: int, tokens: int, names: list[str], settings: Settings) -> list[Row]:
    rows: dict[str, Row] = {}
    running: dict[str, Step] = {}
    for name in (None, *names):
        key = BASE if name is None else captured(name)
        rows[key] = row_of(shape, f"{batch}x{tokens}", f"{WHAT} {shape.name}", key, torch.bfloat16, "training")
        try:
            step = Step(shape, batch, tokens, settings.device, name)
            for _ in range(2):  # allocates the optimizer's state
                loss = step()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss is {loss.item()}")
            running[key] = step
        except Exception as error:
            rows[key] |= {"status": "error", "note": describe(error)}
    wall = wall_times(dict(running), settings.repeats, seconds=SECONDS)
    for key, step in running.items():
        step.optimizer.zero_grad()
        rows[key] |= {
            "status": "ok",
            "wall_us": wall[key].as_dict(),
            "peak_mib": peak_bytes(step, step.tensors()) / MIB,
        }
    add_overheads(rows, BASE)
    return list(rows.values())
