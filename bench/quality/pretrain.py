"""Makes an encoder that was only pre-trained, as in the paper: masked language modelling on sentences, from the bundled model's
weights on, until its embeddings are those of a language model. A stand-in for BERT, whose weights need a network.

    python bench/quality/pretrain.py --texts FILE --output FOLDER       # one sentence a line; a folder for --encoder

AdamW, linear warm-up and decay, on a GPU in bfloat16 autocast, two minutes there. The loss is written beside the other results.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import record
import torch

from quality.data import bundled_path
from quality.finetune import schedule

BATCH, LEARNING_RATE, MASKED = 512, 3e-4, 0.15
MAX_LENGTH = 64  # tokens; few of the sentences are longer
SORTED = 64  # batches whose sentences are sorted by length together, which saves most of the padding
SAID = 250  # steps


def batches(lengths: list[int], batch: int, shuffled: random.Random) -> Iterator[list[int]]:
    """Rows of sentences of similar length, every sentence once an epoch, without end."""
    while True:
        rows = list(range(len(lengths)))
        shuffled.shuffle(rows)
        for start in range(0, len(rows), SORTED * batch):
            some = sorted(rows[start : start + SORTED * batch], key=lengths.__getitem__)
            cut = [some[first : first + batch] for first in range(0, len(some), batch)]
            shuffled.shuffle(cut)
            yield from cut


def pretrain(path: str, texts: list[str], output: Path, steps: int, batch: int, device: str) -> dict[str, object]:
    """Write encoder and tokenizer to ``output``; the mean loss of every SAID steps."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    torch.manual_seed(0)  # of the head, which is new, and of the masks
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).to(device).train()
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, pad_to_multiple_of=8)
    ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01}
    plain = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, plain], lr=LEARNING_RATE)
    rates = schedule(optimizer, steps)
    rows = batches([len(one) for one in ids], batch, random.Random(0))
    losses, summed, start = [], torch.zeros((), device=device), time.perf_counter()
    for step in range(1, steps + 1):
        inputs = mask([{"input_ids": ids[row]} for row in next(rows)]).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss = model(**inputs).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        summed += loss.detach()
        if step % SAID == 0 or step == steps:
            losses.append({"step": step, "loss": summed.item() / (step - (losses[-1]["step"] if losses else 0))})
            summed.zero_()
            print(losses[-1], flush=True)
    model.base_model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {
        "steps": steps, "batch": batch, "learning_rate": LEARNING_RATE, "masked": MASKED, "texts": len(texts),
        "losses": losses, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a file of sentences, one a line")
    parser.add_argument("--output", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--encoder", help="folder of the encoder (default: the bundled all-MiniLM-L6-v2)")
    parser.add_argument("--results", type=Path, default=record.RESULTS / "quality/pretrain.json")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    texts = options.texts.read_text(encoding="utf-8").splitlines()
    path = bundled_path() if options.encoder is None else options.encoder
    row = pretrain(path, texts, options.output, options.steps, options.batch, options.device)
    record.write(options.results, {"section": "pretrain", "environment": record.environment(), "rows": [row]})
    print(options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
