"""Folders of every kind of model around one encoder."""

import torch
from builders import save_model


def save_kinds(root, **options):
    """``builders.save_model``, and beside it a "model" of S2SentModel, made with these options, and a "classifier", each with its
    tokenizer."""
    import transformers

    from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

    save_model(root)
    torch.manual_seed(0)
    model = S2SentModel.from_encoder(root / "encoder", None, bottleneck=4, **options)
    model.save_pretrained(root / "model")
    S2SentForSequenceClassification.from_model(model).save_pretrained(root / "classifier")
    for name in ("model", "classifier"):
        transformers.AutoTokenizer.from_pretrained(root / "encoder").save_pretrained(root / name)
