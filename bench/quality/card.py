"""The text of a shipped selector's model card."""

from __future__ import annotations

from quality.encoders import BUNDLED

CARD = """\
---
license: apache-2.0
base_model: sentence-transformers/{name}
tags: [sentence-embeddings, s2sent]
---

# S2Sent selector for {name}

Written by `bench/quality/train_selector.py`; no number is typed by hand.
`S2SentSelector.from_pretrained("{name}")` returns it.

It reads all {blocks} blocks of [{name}](https://huggingface.co/sentence-transformers/{name}) (Apache-2.0; not
part of this package, its attribution stays with it) and replaces the mean of its last block as the sentence embedding.
Bottleneck {bottleneck}, {frequencies} DCT components, batch norm, block prior{scale}; {parameters:,} parameters,
{percent:.2f} % of the encoder's {encoder:,}, in half precision.

## Training

The encoder's weights are frozen. InfoNCE with hard negatives, temperature {temperature}, batches of {batch_size},
{over}AdamW, learning rate {learning_rate:g} (prior and gate scale {prior_learning_rate:g}), at most {epochs} epochs,
on {triplets:,} triplets (anchor, entailed, contradicted) from SNLI (CC BY-SA 4.0), MultiNLI and counterfactual NLI (Apache-2.0),
from which the sentences of the STS and SICK sets were removed.

Learning rate, bottleneck, start of the gate scale, epoch and seed were selected by the loss of {held_out:,} more triplets that
trained nothing; no set of similarities selected anything. That rule is not blind: STS-B dev selected first, and was given up
after its test scores were known; a gate scale from 2 was tried after one from 4, and several widths after one.

The {dev:,} pairs of STS-B dev share some with the test sets, by unordered, case-folded texts ({shared}); {apart:,} are in none.
What either of them selects is shown below.

To repeat it, where FOLDER has the data that `bench/quality/data.py` describes:

```
{command}
```

## Scores

Spearman × 100 of cosine similarities, each set as one; seeds {seeds}: median (lowest–highest). Every fusion had the same
search over learning rates and epochs.

{table}

{verdict}

{widths}What other ways to select the epoch give:

{rules}

`config.json` also has the weights of the scalar mix that `s2sent evaluate` compares with; block by block:
{mix}. The selector's prior: {prior}{learned_scale}.
The project's `bench/QUALITY.md` has more: what each part is worth, and transfer to classification.
"""


def command(name: str) -> str:
    line = "python bench/quality/train_selector.py --data FOLDER"
    return line if name == BUNDLED else f"{line} --name {name} --encoder ENCODER"
