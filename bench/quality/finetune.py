"""Section "finetune" of bench/quality/quality.py: encoder and fusion trained together, with the same budget for every fusion."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quality.data import MAX_LENGTH, Data, load_encoder, scores
from s2sent_kernels import S2SentSelector, cache, frozen
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.formula.call import Batch
from s2sent_kernels.formula.tokens import Tokens
from s2sent_kernels.tools import evaluation

BATCH = 128
EVALUATED = 128  # batch size without gradients
ENCODER_RATE, SELECTOR_RATE, PRIOR_RATE = 2e-5, 1e-3, 1e-2
WARM_UP = 0.1
TEMPERATURE = 0.05
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"fusion": evaluation.MEAN_OF_LAST},
    {"fusion": evaluation.SCALAR_MIX, "N": 6},
    {"fusion": "s2sent, paper", "N": 3, "prior": False},
    {"fusion": "s2sent, paper", "N": 6, "prior": False},
    {"fusion": "s2sent + prior", "N": 6, "prior": True},
)


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
    def __init__(self, num_blocks: int, prior: bool) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.selector = S2SentSelector(384, num_blocks, 32, 4, block_prior=prior)

    def forward(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        return self.selector.pool(hidden_states, mask)


def _mean(hidden_state: Tensor, mask: Tensor) -> Tensor:
    weights = Tokens.of(Batch([hidden_state], mask)).pooling_weights("mean").to(hidden_state.dtype)
    return (weights[:, None] @ hidden_state)[:, 0]


def build(configuration: dict[str, Any]) -> MeanOfLast | Mixed | Selected:
    if configuration["fusion"] == evaluation.MEAN_OF_LAST:
        return MeanOfLast()
    if configuration["fusion"] == evaluation.SCALAR_MIX:
        return Mixed(configuration["N"])
    return Selected(configuration["N"], configuration["prior"])


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


def _optimizer(encoder: nn.Module, fusion: nn.Module) -> torch.optim.Optimizer:
    priors = [p for name, p in fusion.named_parameters() if name.endswith("block_prior")]
    others = [p for name, p in fusion.named_parameters() if not name.endswith("block_prior")]
    groups = [
        {"params": list(encoder.parameters()), "lr": ENCODER_RATE},
        {"params": others, "lr": SELECTOR_RATE},
        {"params": priors, "lr": PRIOR_RATE, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)


def run(options: Any, data: Data, configuration: dict[str, Any], seed: int) -> dict[str, Any]:
    """One training: scores before it and after each epoch. Nothing is selected: the last epoch is reported."""
    encoder, tokenizer = load_encoder(options.model, options.device)
    torch.manual_seed(seed)
    fusion = build(configuration).to(options.device)
    triplets = data.triplets[: options.limit]
    sts_texts = cache.unique(data.sts_texts())
    optimizer = _optimizer(encoder, fusion)
    total = options.epochs * (len(triplets) // BATCH)

    def factor(step: int) -> float:
        warm = max(1, int(WARM_UP * total))
        return min((step + 1) / warm, (total - step) / max(1, total - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    blocks = f"last:{fusion.num_blocks}"
    start = time.perf_counter()
    losses = []
    with BlockCapture(encoder, blocks) as capture:
        by_epoch = [scores(embed(capture, tokenizer, fusion, sts_texts, options.device), sts_texts, data)]
        for epoch in range(options.epochs):
            order = list(range(len(triplets)))
            random.Random(1000 * seed + epoch).shuffle(order)
            encoder.train()
            fusion.train()
            summed = torch.zeros((), device=options.device)
            for first in range(0, len(order) - BATCH + 1, BATCH):
                chosen = [triplets[place] for place in order[first : first + BATCH]]
                texts = [triplet[k] for k in range(3) for triplet in chosen]
                batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
                batch = batch.to(options.device)
                parts = fusion(capture.collect(**batch), batch["attention_mask"]).split(BATCH)
                loss = frozen.info_nce(*parts, TEMPERATURE)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                summed += loss.detach()
            losses.append(summed.item() / max(1, len(order) // BATCH))
            by_epoch.append(scores(embed(capture, tokenizer, fusion, sts_texts, options.device), sts_texts, data))
    seconds = time.perf_counter() - start
    print(f"{configuration} seed {seed}: mean {by_epoch[-1]['mean']:.2f}, {seconds:.0f} s", flush=True)
    return configuration | {
        "seed": seed, "losses": losses, "by_epoch": by_epoch, "scores": by_epoch[-1], "seconds": seconds,
        "epochs": options.epochs, "batch": BATCH, "triplets": len(triplets),
        "parameters": sum(parameter.numel() for parameter in fusion.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
    }  # fmt: skip


def measure(options: Any) -> Iterator[dict[str, Any]]:
    data = Data.read(options.data)
    index, parts = options.part
    work = [(configuration, seed) for seed in options.seeds for configuration in CONFIGURATIONS]
    for configuration, seed in work[index::parts]:
        yield run(options, data, configuration, seed)
