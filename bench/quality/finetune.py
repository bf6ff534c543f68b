"""Encoder and fusion trained together, with the same budget for every fusion: sections "finetune", "stand-in-finetune" and
"stand-in-simcse" of bench/quality/quality.py.

SimCSE without supervision has no pairs: a sentence's positive is itself, encoded again under another dropout.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import record
import torch
from torch import Tensor, nn

from quality.data import MAX_LENGTH, Data, load, load_encoder, scores
from quality.train_selector import GATE_SCALE
from s2sent_kernels import S2SentSelector, cache, frozen
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.formula.call import Batch
from s2sent_kernels.formula.tokens import Tokens
from s2sent_kernels.tools import evaluation

EVALUATED = 128  # batch size without gradients
SELECTOR_RATE, PRIOR_RATE = 1e-3, 1e-2
WARM_UP = 0.1
TEMPERATURE = 0.05
CLS = "cls"
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"fusion": evaluation.MEAN_OF_LAST},
    {"fusion": evaluation.SCALAR_MIX, "N": 6},
    {"fusion": "s2sent, paper", "N": 3, "prior": False},
    {"fusion": "s2sent, paper", "N": 6, "prior": False},
    {"fusion": "s2sent + prior", "N": 6, "prior": True},
    {"fusion": "s2sent + prior, gate scale", "N": 6, "prior": True, "scale": GATE_SCALE},
)
STAND_IN_CONFIGURATIONS = ({"fusion": CLS}, *(one for one in CONFIGURATIONS if one["fusion"] != "s2sent + prior"))


class Budget(NamedTuple):
    """What every fusion is trained on, and how."""

    rows: list[tuple[str, ...]]  # anchor, positive, and a hard negative where there is one
    epochs: int
    batch: int
    encoder_rate: float


class Cls(nn.Module):
    num_blocks = 1

    def forward(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        return hidden_states[-1][:, 0]


class MeanOfLast(nn.Module):
    num_blocks = 1

    def forward(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        return _mean(hidden_states[-1], mask)


class Mixed(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks, self.mix = num_blocks, frozen.ScalarMix(num_blocks)

    def forward(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        return self.mix(torch.stack([_mean(u, mask) for u in hidden_states], dim=1))


class Selected(nn.Module):
    def __init__(self, num_blocks: int, prior: bool, scale: float | None) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.selector = S2SentSelector(384, num_blocks, 32, 4, block_prior=prior, gate_scale=scale)

    def forward(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        return self.selector.pool(hidden_states, mask)


def _mean(hidden_state: Tensor, mask: Tensor) -> Tensor:
    weights = Tokens.of(Batch([hidden_state], mask)).pooling_weights("mean").to(hidden_state.dtype)
    return (weights[:, None] @ hidden_state)[:, 0]


def build(configuration: dict[str, Any]) -> Cls | MeanOfLast | Mixed | Selected:
    if configuration["fusion"] == CLS:
        return Cls()
    if configuration["fusion"] == evaluation.MEAN_OF_LAST:
        return MeanOfLast()
    if configuration["fusion"] == evaluation.SCALAR_MIX:
        return Mixed(configuration["N"])
    return Selected(configuration["N"], configuration["prior"], configuration.get("scale"))


def embed(capture: BlockCapture, tokenizer: Any, fusion: Any, texts: list[str], device: str) -> Tensor:
    """[S, D] in eval mode, for texts that are all different."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    result: list[Tensor] = []
    capture.encoder.eval()
    fusion.eval()
    with torch.no_grad():
        for start in range(0, len(order), EVALUATED):
            some = [texts[place] for place in order[start : start + EVALUATED]]
            batch = tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt").to(
                device
            )
            result.append(fusion(capture.collect(**batch), batch["attention_mask"]))
    embeddings = torch.cat(result)
    return embeddings[torch.tensor(order).argsort()].cpu()


def _optimizer(encoder: nn.Module, fusion: nn.Module, encoder_rate: float) -> torch.optim.Optimizer:
    far = ("block_prior", "gate_scale")  # what moves much further than a weight
    priors = [p for name, p in fusion.named_parameters() if name.endswith(far)]
    others = [p for name, p in fusion.named_parameters() if not name.endswith(far)]
    groups = [
        {"params": list(encoder.parameters()), "lr": encoder_rate},
        {"params": others, "lr": SELECTOR_RATE},
        {"params": priors, "lr": PRIOR_RATE, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)


def schedule(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and decay over ``total`` steps."""
    warm = max(1, int(WARM_UP * total))

    def factor(step: int) -> float:
        return min((step + 1) / warm, (total - step) / max(1, total - warm))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def run(options: Any, data: Data, configuration: dict[str, Any], seed: int, budget: Budget) -> dict[str, Any]:
    """One training: scores before it and after each epoch. Nothing is selected: the last epoch is reported."""
    encoder, tokenizer = load_encoder(options.model, options.device)
    torch.manual_seed(seed)
    fusion = build(configuration).to(options.device)
    rows, batch_size = budget.rows[: options.limit], budget.batch
    sts_texts = cache.unique(data.sts_texts())
    optimizer = _optimizer(encoder, fusion, budget.encoder_rate)
    rates = schedule(optimizer, budget.epochs * (len(rows) // batch_size))
    blocks = f"last:{fusion.num_blocks}"
    start = time.perf_counter()
    losses = []
    with BlockCapture(encoder, blocks) as capture:
        by_epoch = [scores(embed(capture, tokenizer, fusion, sts_texts, options.device), sts_texts, data)]
        for epoch in range(budget.epochs):
            order = list(range(len(rows)))
            random.Random(1000 * seed + epoch).shuffle(order)
            encoder.train()
            fusion.train()
            summed = torch.zeros((), device=options.device)
            for first in range(0, len(order) - batch_size + 1, batch_size):
                chosen = [rows[place] for place in order[first : first + batch_size]]
                texts = [text for column in zip(*chosen, strict=True) for text in column]
                batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
                batch = batch.to(options.device)
                anchor, positive, *negatives = fusion(capture.collect(**batch), batch["attention_mask"]).split(
                    batch_size
                )
                loss = frozen.info_nce(anchor, positive, negatives[0] if negatives else None, TEMPERATURE)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rates.step()
                summed += loss.detach()
            losses.append(summed.item() / max(1, len(order) // batch_size))
            by_epoch.append(scores(embed(capture, tokenizer, fusion, sts_texts, options.device), sts_texts, data))
    seconds = time.perf_counter() - start
    print(f"{configuration} seed {seed}: mean {by_epoch[-1]['mean']:.2f}, {seconds:.0f} s", flush=True)
    return configuration | {
        "seed": seed, "losses": losses, "by_epoch": by_epoch, "scores": by_epoch[-1], "seconds": seconds,
        "epochs": budget.epochs, "batch": batch_size, "rate": budget.encoder_rate, "triplets": len(rows),
        "parameters": sum(parameter.numel() for parameter in fusion.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
    }  # fmt: skip


def _runs(
    options: Any, data: Data, configurations: Sequence[dict[str, Any]], budget: Budget
) -> Iterator[dict[str, Any]]:
    there = [(row["fusion"], row.get("N"), row["seed"]) for row in load(options.output, options.section)[0]]
    work = [(configuration, seed) for seed in options.seeds for configuration in configurations]
    if options.missing:
        work = [(one, seed) for one, seed in work if (one["fusion"], one.get("N"), seed) not in there]
    index, parts = options.part
    for configuration, seed in work[index::parts]:
        yield run(options, data, configuration, seed, budget)


def measure(options: Any) -> Iterator[dict[str, Any]]:
    """From the bundled encoder, which was trained for similarity before."""
    data = Data.read(options.data)
    yield from _runs(options, data, CONFIGURATIONS, Budget([*data.triplets], options.epochs or 3, 128, 2e-5))


def stand_in(options: Any) -> Iterator[dict[str, Any]]:
    """From an encoder that was only pre-trained, --encoder, on triplets."""
    data = Data.read(options.data)
    yield from _runs(options, data, STAND_IN_CONFIGURATIONS, Budget([*data.triplets], options.epochs or 1, 128, 5e-5))


def simcse(options: Any) -> Iterator[dict[str, Any]]:
    """The same without supervision, on the sentences of --texts: the setting of the paper's first table."""
    if options.texts is None:
        raise record.UserError("--texts: expected a file of sentences, one a line")
    sentences = options.texts.read_text(encoding="utf-8").splitlines()
    budget = Budget([(text, text) for text in sentences], options.epochs or 1, 128, 3e-5)
    yield from _runs(options, Data.read(options.data), STAND_IN_CONFIGURATIONS, budget)
