"""The encoders that a selector is trained and shipped for: what cannot be read off their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoder:
    name: str  # of the shipped selector, too
    max_length: int  # tokens, of the model's own pipeline
    bottlenecks: tuple[int, ...]  # H that are tried; a selector in half precision has to stay below 1.5 MB
    published: dict[str, float]  # Spearman x 100 of the mean of its last block, from the model card's MTEB results


BUNDLED, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder(BUNDLED, 256, (32,), {"STS12": 72.37, "STS14": 75.59, "STS16": 78.99, "STS-B": 82.03}),
        Encoder(MPNET, 384, (64,), {"STS12": 72.63, "STS14": 78.00, "STS16": 80.03, "STS-B": 83.42}),
    )
}
# What is measured and not shipped: the bundled encoder cut short, or after bench/quality/pretrain.py.
STAND_IN = Encoder("stand-in", 256, (32,), {})
