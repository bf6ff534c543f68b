"""Further objectives for the bundled encoder's selector: the similarities of a larger model, and embeddings that can be cut.

Distillation: the divergence of the student's from the teacher's distribution over a batch's other texts, each the softmax of its
cosine similarities. ``weight`` of it is the loss, and the rest InfoNCE. It needs no labels: with weight 1 the texts are those of
triplets without their order, or sentences. The teacher is the larger shipped selector behind its encoder. Of one form of loss the
divergence on held-out triplets selects epochs and learning rates.

Widths: the mean of InfoNCE over the first 64, 128, 256 and all features, as in frozen.Recipe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quality.data import (
    CHOSEN_ON,
    HELD_OUT_BATCH,
    TEMPERATURE,
    Data,
    Frozen,
    averages,
    held_out_score,
    load_encoder,
    scores,
)
from quality.encoders import BUNDLED, ENCODERS, MPNET
from s2sent_kernels import Embedder, S2SentSelector, cache, frozen, frozen_loop
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]

FREQUENCIES, EPOCHS = 4, 5
BOTTLENECK = ENCODERS[BUNDLED].bottlenecks[0]
RATES = (1e-3, 3e-3)
STARTS = (2.0, 4.0)  # of the gate scale
WEIGHTS = (0.5, 1.0)
TEMPERATURES = (TEMPERATURE, 2 * TEMPERATURE)  # of the teacher's and the student's similarities
WIDTHS = (64, 128, 256, 384)
SENTENCES = 50_000
BATCH = 768  # texts whose similarities are compared, as many as a batch of triplets has
DIVERGENCE = "held-out divergence"


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of each text's distributions over the others, from embeddings [B, D] and [B, D']; their mean."""
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)

    def log_probabilities(values: Tensor) -> Tensor:
        values = F.normalize(values.float(), dim=1)
        similarity = values @ values.T / temperature
        return similarity.masked_fill(own, -torch.finfo(similarity.dtype).max).log_softmax(dim=1)

    return F.kl_div(log_probabilities(student), log_probabilities(teacher), reduction="batchmean", log_target=True)


class Trainer:
    """Trains selectors on one set of cached features, and scores them after each epoch."""

    def __init__(self, cached: Frozen, teacher: Tensor) -> None:
        self.cached, self.teacher = cached, teacher  # [rows, D'] of the triplets' texts
        self.nli, self.sts = cached.features(cached.num_blocks, FREQUENCIES)
        self.anchor, self.positive, self.negative = (rows.to(cached.device) for rows in cached.rows)
        self.held_rows = cached.held.to(cached.device)
        self.held = self.nli.take(self.held_rows)

    def batch(self, module: S2SentSelector, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [3 B, D] of anchors, positives and negatives, and their rows."""
        chosen = chosen.to(self.cached.device)
        rows = torch.cat([self.anchor[chosen], self.positive[chosen], self.negative[chosen]])
        return frozen.embed(module, self.nli.take(rows)), rows

    def run(
        self, seed: int, rate: float, start: float, count: int, loss: Callable[[S2SentSelector, Tensor], Tensor],
        batch: int, kept: str,
    ) -> tuple[S2SentSelector, Row]:  # fmt: skip
        """A selector trained for EPOCHS over ``count`` examples in batches, of which ``kept`` selects the epoch."""
        began = time.perf_counter()
        torch.manual_seed(seed)
        module = S2SentSelector(
            self.cached.hidden_size, self.cached.num_blocks, BOTTLENECK, FREQUENCIES,
            block_prior=True, gate_scale=start, backend="reference",
        ).to(self.cached.device)  # fmt: skip
        by_epoch: list[dict[str, float]] = []

        def score() -> float:
            found = scores(frozen.embed_all(module, self.sts), self.cached.sts_texts, self.cached.data)
            embeddings = frozen.embed_all(module, self.held)
            by_epoch.append(
                found | {CHOSEN_ON: held_out_score(embeddings), DIVERGENCE: self.held_out_divergence(embeddings)}
            )
            return by_epoch[-1][kept]

        recipe = frozen.Recipe(epochs=EPOCHS, learning_rate=rate, seed=seed, batch_size=batch)
        history = frozen_loop.run(module, count, lambda chosen: loss(module, chosen), recipe, score)
        row = {"rate": rate, "start": start, "seed": seed, "by_epoch": by_epoch, "epoch": history.kept}
        return module, row | {"scores": by_epoch[history.kept], "seconds": time.perf_counter() - began}

    def held_out_divergence(self, embeddings: Tensor) -> float:
        """Minus the mean divergence of held-out triplets, at the triplets' temperature."""
        parts = [part.split(HELD_OUT_BATCH) for part in embeddings.chunk(3)]
        rows = [part.split(HELD_OUT_BATCH) for part in self.held_rows.chunk(3)]
        of_batches = [
            divergence(torch.cat(some), self.teacher[torch.cat(where)], TEMPERATURE)
            for some, where in zip(zip(*parts, strict=True), zip(*rows, strict=True), strict=True)
        ]
        return -torch.stack(of_batches).mean().item()


def measure(options: Any) -> Iterator[Row]:
    data, device = Data.read(options.data), options.device
    cached = Frozen(data, options.cache, options.model, device, options.token_frequencies)
    sentences, of_sentences = _sentences(options, cached)
    larger = Embedder.from_pretrained(options.teacher, MPNET, dtype="float32", device=device)
    wanted = (cache.unique(data.triplet_texts()), cached.sts_texts, sentences)
    of_triplets, of_sts, of_teacher = (
        torch.from_numpy(larger.encode(some, progress=False)).to(device) for some in wanted
    )
    trainer = Trainer(cached, of_triplets)
    yield {"form": "teacher", "scores": scores(of_sts, cached.sts_texts, data)}
    count = len(trainer.anchor)

    def both(weight: float, temperature: float) -> Callable[[S2SentSelector, Tensor], Tensor]:
        def loss(module: S2SentSelector, chosen: Tensor) -> Tensor:
            embeddings, rows = trainer.batch(module, chosen)
            taught = divergence(embeddings, trainer.teacher[rows], temperature)
            return weight * taught + (1 - weight) * frozen.info_nce(*embeddings.chunk(3), TEMPERATURE)

        return loss

    def alone(temperature: float) -> Callable[[S2SentSelector, Tensor], Tensor]:
        def loss(module: S2SentSelector, chosen: Tensor) -> Tensor:
            chosen = chosen.to(device)
            return divergence(frozen.embed(module, of_sentences.take(chosen)), of_teacher[chosen], temperature)

        return loss

    for seed in options.seeds:
        for rate in RATES:
            for start in STARTS:
                for temperature in TEMPERATURES:
                    same = {"temperature": temperature}
                    for weight in WEIGHTS:
                        _, row = trainer.run(seed, rate, start, count, both(weight, temperature), 256, DIVERGENCE)
                        yield _told({"form": "triplets", "weight": weight} | same | row)
                    _, row = trainer.run(seed, rate, start, len(sentences), alone(temperature), BATCH, DIVERGENCE)
                    yield _told({"form": "sentences", "weight": 1.0} | same | row)
        yield from _widths(trainer, seed, count)


def _widths(trainer: Trainer, seed: int, count: int) -> Iterator[Row]:
    """Selectors trained for one width or for several, each cut at every width."""
    cached = trainer.cached

    def loss(widths: tuple[int, ...]) -> Callable[[S2SentSelector, Tensor], Tensor]:
        def mean(module: S2SentSelector, chosen: Tensor) -> Tensor:
            parts = trainer.batch(module, chosen)[0].chunk(3)
            of_widths = [frozen.info_nce(*(part[:, :width] for part in parts), TEMPERATURE) for width in widths]
            return torch.stack(of_widths).mean()

        return mean

    def cut(embeddings: Tensor) -> dict[str, float]:
        return {str(width): scores(embeddings[:, :width], cached.sts_texts, cached.data)["mean"] for width in WIDTHS}

    for form, widths in (("one width", WIDTHS[-1:]), ("several widths", WIDTHS)):
        module, row = trainer.run(seed, RATES[1], STARTS[1], count, loss(widths), 256, CHOSEN_ON)
        yield _told({"form": form} | row | {"widths": cut(frozen.embed_all(module, trainer.sts))})
    last = averages(trainer.sts.pooled)[evaluation.MEAN_OF_LAST]
    yield {"form": evaluation.MEAN_OF_LAST, "seed": seed, "widths": cut(last)}


def _sentences(options: Any, cached: Frozen) -> tuple[list[str], frozen.Features]:
    """Sentences without labels, and their features."""
    lines = cache.unique([line for line in Path(options.texts).read_text(encoding="utf-8").splitlines() if line])
    random.Random(0).shuffle(lines)
    lines = lines[: options.limit or SENTENCES]
    encoder, tokenizer = load_encoder(options.model, options.device)
    settings = cache.Settings(token_frequencies=options.token_frequencies, max_length=ENCODERS[BUNDLED].max_length)
    made = cache.make(encoder, tokenizer, lines, options.cache, settings, progress=True)
    return lines, frozen.Features.of(made, cached.num_blocks, FREQUENCIES, made.rows(lines)).to(options.device)


def _told(row: Row) -> Row:
    shown = {name: value for name, value in row.items() if name not in ("by_epoch", "scores")}
    print(f"{shown}: mean {row['scores']['mean']:.2f}", flush=True)
    return row
