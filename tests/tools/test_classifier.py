"""A classifier with its encoder, by transformers' Trainer: learning rates, the dev part, what is left on the disk."""

import pytest
import torch
from builders import save_encoder, sentences

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from s2sent_kernels.tools import classifier
from s2sent_kernels.tools.problems import CLASSES, Problem
from s2sent_kernels.tools.recipe import Recipe


@pytest.fixture
def model_and_tokenizer(tmp_path):
    save_encoder(tmp_path / "encoder")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    arguments = {"bottleneck": 4, "block_prior": True, "gate_scale": 4.0, "backend": "reference"}
    model = classifier.make(encoder, classifier.Fusion(None, "mean", arguments), Problem(CLASSES, 2), ["no", "yes"])
    return model, transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")


def examples(count, seed=0):
    texts = sentences(count, seed)
    return classifier.Examples(texts, torch.tensor([int("moon" in text) for text in texts]))


def test_encoder_selector_and_prior_have_their_own_learning_rates(tmp_path, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    recipe = Recipe(epochs=1, batch_size=8, learning_rate=0.0, selector_learning_rate=1e-12, prior_learning_rate=1e-2)
    classifier.fine_tune(model, tokenizer, examples(16), examples(9, 1), tmp_path / "out", recipe)
    moved = {name: (tensor.detach() - before[name]).abs().max().item() for name, tensor in model.named_parameters()}
    assert moved.pop("model.selector.block_prior") > 1e-4 and moved.pop("model.selector.gate_scale") > 1e-4
    assert max(moved.values()) < 1e-6 and {n for n in moved if moved[n]} <= {n for n in moved if ".encoder." not in n}
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png") == [
        "config.json",
        "history.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_all_of_the_dev_part_counts_and_an_error_leaves_nothing(tmp_path, model_and_tokenizer, monkeypatch):
    """Nine examples are one batch of eight and a rest, which training drops."""
    seen = []

    def score(self, logits, targets):
        seen.append(len(targets))
        raise RuntimeError("stop")

    monkeypatch.setattr(Problem, "score", score)
    with pytest.raises(RuntimeError, match="stop"):
        classifier.fine_tune(*model_and_tokenizer, examples(16), examples(9, 1), tmp_path / "out", Recipe(batch_size=8))
    assert seen == [9] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"epochs": 0}, {"learning_rate": -1.0}, {"precision": "int8"}])
def test_recipes_that_cannot_be(tmp_path, model_and_tokenizer, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
        classifier.fine_tune(*model_and_tokenizer, examples(16), examples(9), tmp_path / "out", Recipe(**change))
    assert not (tmp_path / "out").exists()
