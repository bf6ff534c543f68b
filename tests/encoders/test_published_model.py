"""Whole checkpoints of the published code, and the classifier behind S2SentModel."""

import json
import resource
from pathlib import Path

import killing
import pytest
import torch

transformers = pytest.importorskip("transformers")

from builders import save_encoder  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from s2sent_kernels import S2SentSelector  # noqa: E402
from s2sent_kernels.capture import BlockCapture  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def make(family="bert"):
    """An encoder, and the state_dict that the published code would save with it (3 blocks, M = 4)."""
    torch.manual_seed(0)
    kind, config = (
        (transformers.BertModel, transformers.BertConfig(**SIZES))
        if family == "bert"
        else (transformers.RobertaModel, transformers.RobertaConfig(**SIZES))
    )
    encoder = kind(config, add_pooling_layer=False).eval()
    selector = S2SentSelector(16, 3, 8, 4, profile="official")
    state = {f"{family}.{key}": tensor for key, tensor in encoder.state_dict().items()}
    names = {"down.weight": "dense_z.0.weight", "down.bias": "dense_z.0.bias"}
    for key, tensor in selector.state_dict().items():
        if key in names:
            state[f"S2A.{names[key]}"] = torch.randn_like(tensor)
    for n in range(3):
        stem = f"S2A.dense_select_weights.{n}."
        state[stem + "0.weight"], state[stem + "0.bias"] = torch.randn(16, 8), torch.randn(16)
        state |= {
            stem + f"1.{name}": torch.rand(16) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")
        }
        state[stem + "1.num_batches_tracked"] = torch.tensor(7)
    state |= {"mlp.dense.weight": torch.randn(16, 16), "mlp.dense.bias": torch.randn(16)}
    return encoder, {key: tensor.clone() for key, tensor in state.items()}


def save(folder, encoder, state, suffix=".safetensors"):
    encoder.config.save_pretrained(folder)
    if suffix == ".bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family, suffix", [("bert", ".safetensors"), ("roberta", ".bin")])
@torch.no_grad()
def test_it_computes_what_its_parts_compute(tmp_path, family, suffix):
    encoder, state = make(family)
    model = S2SentModel.from_published(save(tmp_path, encoder, state, suffix))
    selector = S2SentSelector.from_published(state, "S2A.").eval()
    found = model(**BATCH).embedding
    with BlockCapture(encoder, "last:3") as capture:
        expected = capture.pool(selector, **BATCH)
    assert torch.equal(found, expected) and model.config.blocks == [1, 2, 3]
    with_head = S2SentModel.from_published(tmp_path, head=True)
    expected = torch.tanh(torch.nn.functional.linear(expected, state["mlp.dense.weight"], state["mlp.dense.bias"]))
    torch.testing.assert_close(with_head(**BATCH).embedding, expected)
    torch.testing.assert_close(with_head(**BATCH, output_gates=True).embedding, expected)
    for number, made in enumerate((model, with_head)):
        made.save_pretrained(tmp_path / str(number))
        loaded = transformers.AutoModel.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(**BATCH).embedding, made(**BATCH).embedding)


def test_what_else_a_checkpoint_may_hold(tmp_path):
    encoder, state = make()
    state |= {"bert.embeddings.position_ids": torch.arange(512)[None], "lm_head.bias": torch.zeros(50)}
    state |= {"bert.pooler.dense.weight": torch.ones(16, 16), "bert.pooler.dense.bias": torch.ones(16)}
    model = S2SentModel.from_published(save(tmp_path, encoder, state), [0, 2, 3], pooling="cls")
    assert model.config.blocks == [0, 2, 3] and model.config.pooling == "cls"


@pytest.mark.parametrize(
    "change, options, message",
    [
        (
            lambda s: s.pop("bert.embeddings.word_embeddings.weight"),
            {},
            "expected the encoder's bert.embeddings.word_emb",
        ),
        (lambda s: s.pop("S2A.dense_z.0.weight"), {}, "expected the published key 'S2A.dense_z.0.weight'"),
        (lambda s: s.update({"bert.encoder.more": torch.ones(1)}), {}, "got bert.encoder.more"),
        (lambda s: s.update({"other.weight": torch.ones(1)}), {}, "got other.weight"),
        (lambda s: s.update({"mlp.dense.weight": torch.ones(8, 16)}), {}, "expected mlp.dense.weight .D, D."),
        (lambda s: s.update({"bert.embeddings.LayerNorm.bias": torch.ones(8)}), {}, "size mismatch"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("mlp.")],
            {"head": True},
            "head: expected keys mlp.",
        ),
        (lambda s: None, {"blocks": "last:2"}, "blocks: expected 3, as the selector has"),
        (lambda s: None, {"pooling": "max"}, "pooling: expected one of"),
    ],
)
def test_broken_checkpoints(tmp_path, change, options, message):
    encoder, state = make()
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        S2SentModel.from_published(save(tmp_path, encoder, state), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected as many as in"),
        ({"intermediate_size": 10**9}, "size mismatch"),
        ({"vocab_size": 10**12}, "size mismatch"),
    ],
)
def test_a_config_costs_no_memory(tmp_path, change, message):
    save(tmp_path, *make())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=message):
            S2SentModel.from_published(tmp_path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    killing.finished(measured)


def test_missing_folders_files_and_other_encoders(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a folder with config\.json and model\.safetensors or pytorch_model\.bin"
    ):
        S2SentModel.from_published(tmp_path / "nowhere")
    encoder, state = make()
    save(tmp_path, encoder, state)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        S2SentModel.from_published(tmp_path)
    transformers.T5Config(d_model=16).save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected an encoder of bert, roberta, xlm-roberta, got 't5'"):
        S2SentModel.from_published(tmp_path)


# ---------------------------------------------------------------- classification


def classifier(**options):
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**SIZES))
    return S2SentForSequenceClassification.from_encoder(encoder, "last:2", bottleneck=4, frequencies=4, **options)


@pytest.mark.parametrize(
    "num_labels, labels, problem",
    [
        (1, torch.tensor([0.5, 1.5]), "regression"),
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "multi_label_classification"),
    ],
    ids=["regression", "single_label", "multi_label"],
)
def test_losses_are_those_of_transformers(num_labels, labels, problem):
    model = classifier(num_labels=num_labels)
    output = model(**BATCH, labels=labels)
    logits = output.logits
    assert logits.shape == (2, num_labels) and model.config.problem_type == problem
    expected = {
        "regression": lambda: torch.nn.functional.mse_loss(logits.squeeze(), labels),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(logits, labels),
    }[problem]()
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for module in (model.model.encoder, model.model.selector, model.classifier):
        assert any(p.grad is not None and p.grad.any() for p in module.parameters())
    assert len(model(**BATCH, labels=labels, return_dict=False)) == 2


def test_labels_are_as_many_as_asked_for(caplog):
    """The model's own label names stay if there are as many as labels."""
    transformers.logging.enable_propagation()
    try:
        model = classifier(num_labels=3)
    finally:
        transformers.logging.disable_propagation()
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(3)} and "num_labels" not in caplog.text
    model.model.config.id2label = {0: "bad", 1: "good"}
    again = S2SentForSequenceClassification.from_model(model.model, num_labels=2)
    assert again.config.id2label == {0: "bad", 1: "good"}


@torch.no_grad()
def test_a_classifier_comes_back_with_the_same_bits(tmp_path):
    model = classifier(num_labels=3, classifier_dropout=0.3)
    model.save_pretrained(tmp_path)
    for kind in (S2SentForSequenceClassification, transformers.AutoModelForSequenceClassification):
        loaded = kind.from_pretrained(tmp_path)
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
        assert loaded.dropout.p == 0.3 and loaded.config.num_labels == 3


def test_trainer_and_pipeline(tmp_path):
    save_encoder(tmp_path / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")
    model = S2SentForSequenceClassification.from_encoder(tmp_path / "encoder", None, bottleneck=4, frequencies=4)
    texts = ["a cat sat", "the moon is bright"] * 8
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=12,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=transformers.DataCollatorWithPadding(tokenizer)
    ).train()
    classify = transformers.pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu")
    assert [found["label"] for found in classify(texts[:2])] == ["LABEL_0", "LABEL_1"]


def test_what_is_pushed_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    sent = {}
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, *a, **k: huggingface_hub.RepoUrl("https://huggingface.co/me/it"),
    )

    def commit(self, *arguments, operations=(), **options):
        sent.update({operation.path_in_repo: operation.path_or_fileobj for operation in operations})
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        for name, content in sent.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    )  # otherwise it would look for an existing card
    model = S2SentModel.from_encoder(transformers.BertModel(transformers.BertConfig(**SIZES)), "last:2", bottleneck=4)
    model.push_to_hub("me/it")
    assert {"config.json", "model.safetensors"} <= set(sent)
    with torch.no_grad():
        assert torch.equal(S2SentModel.from_pretrained(tmp_path / "hub")(**BATCH).embedding, model(**BATCH).embedding)
