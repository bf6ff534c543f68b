"""A saved model comes back with the same bits, whichever dtypes encoder and selector have; and ``dtype`` is the encoder's."""

import itertools

import pytest
import torch
import transformers
from torch import nn

from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of an encoder and its selector. Early releases of transformers load every selector in float32.
EXACT = hasattr(transformers.PreTrainedModel, "_get_dtype_plan")
PAIRS = list(itertools.product(DTYPES, DTYPES if EXACT else DTYPES[:1]))
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def make_encoder(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval().to(dtype)


def disturb(selector, dtype=torch.float32):
    """Statistics that 16 bits cannot hold, then the dtype."""
    with torch.no_grad():
        selector.norm.running_mean.normal_()
        selector.norm.running_var.uniform_(0.5, 2.0)
    return selector.to(dtype)


def make_model(encoder_dtype, selector_dtype):
    model = S2SentModel.from_encoder(make_encoder(encoder_dtype), "last:2", bottleneck=4, gate_scale=3.0)
    assert {parameter.dtype for parameter in model.selector.parameters()} == {torch.float32}
    disturb(model.selector, selector_dtype)
    return model


def same_state(one: nn.Module, other: nn.Module) -> bool:
    state, again = one.state_dict(), other.state_dict()
    return state.keys() == again.keys() and all(
        tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]) for name, tensor in state.items()
    )


def outputs(model):
    with torch.no_grad():
        found = model(**BATCH, output_gates=True)
    return found.embedding, found.gates


@pytest.mark.parametrize(("encoder_dtype", "selector_dtype"), PAIRS, ids=str)
def test_a_model_comes_back_with_its_dtypes_and_bits(encoder_dtype, selector_dtype, tmp_path):
    model = make_model(encoder_dtype, selector_dtype)
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    for kind in (S2SentModel, transformers.AutoModel):
        again = kind.from_pretrained(tmp_path)
        assert same_state(model, again)
        assert all(map(torch.equal, outputs(again), wanted))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_dtype_is_that_of_the_encoder_and_the_head(head, asked, tmp_path):
    model = make_model(torch.bfloat16, torch.float32)
    if head:
        model = S2SentModel(transformers.AutoConfig.for_model(**{**model.config.to_dict(), "head": True}))
        disturb(model.selector)
    model.save_pretrained(tmp_path)
    again = S2SentModel.from_pretrained(tmp_path, dtype=asked)
    assert same_state(model.selector, again.selector)
    assert {p.dtype for p in again.encoder.parameters()} == {again.dtype} == {asked}
    assert outputs(again)[0].dtype == asked
    for name in ("half", "bfloat16", "double", "float"):  # which cast everything
        assert len({p.dtype for p in getattr(again, name)().parameters()}) == 1


@pytest.mark.parametrize(("encoder_dtype", "selector_dtype"), PAIRS, ids=str)
def test_a_classifier_comes_back_with_its_dtypes_and_bits(encoder_dtype, selector_dtype, tmp_path):
    model = S2SentForSequenceClassification.from_model(make_model(encoder_dtype, selector_dtype), num_labels=3)
    wanted = model(**BATCH, labels=torch.tensor([0, 2]))
    wanted.loss.backward()
    assert wanted.logits.dtype == model.classifier.weight.dtype == encoder_dtype
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same_state(model, again) and torch.equal(again(**BATCH).logits, wanted.logits)
    base = S2SentModel.from_pretrained(tmp_path)  # the same folder without its classifier
    assert same_state(model.model, base)
    cast = S2SentForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_state(cast.model.selector, model.model.selector)
    assert cast(**BATCH).logits.dtype == cast.classifier.weight.dtype == torch.float32


# ---------------------------------------------------------------- sentence-transformers

sentence_transformers = pytest.importorskip("sentence_transformers")
from builders import save_encoder  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402

SentenceTransformer = sentence_transformers.SentenceTransformer
TEXTS = ["the cat sat on the mat", "a dog ran"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path, layers=3)
    return path


def make_sentences(folder, encoder_dtype, selector_dtype):
    transformer = Transformer(str(folder), model_kwargs={"dtype": encoder_dtype})
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=4)
    disturb(pooling.selector, selector_dtype)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def encoded(model):
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("encoder_dtype", "selector_dtype"), PAIRS, ids=str)
def test_a_sentence_transformer_comes_back_with_its_dtypes_and_bits(
    encoder_dtype, selector_dtype, safe, folder, tmp_path
):
    model = make_sentences(folder, encoder_dtype, selector_dtype)
    assert {p.dtype for p in model[1].parameters()} == {selector_dtype}  # which the assembly has not changed
    wanted = encoded(model)
    assert wanted.dtype == encoder_dtype
    model.save(str(tmp_path), create_model_card=False, safe_serialization=safe)
    if safe:
        for again in (
            load(tmp_path, device="cpu", model_kwargs={"dtype": "auto"}),
            SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu"),
            SentenceTransformer(modules=list(model), device="cpu"),
        ):
            assert same_state(again, model) and torch.equal(encoded(again), wanted)
    else:
        assert same_state(S2SentPooling.load(str(tmp_path), subfolder="1_S2SentPooling"), model[1])


def test_to_moves_the_pooling_and_casts_nothing(folder):
    model = make_sentences(folder, torch.bfloat16, torch.float32)
    pooling = model[1]
    for arguments in ((torch.float16,), ("cpu", torch.float16), (torch.zeros(1, dtype=torch.float16),)):
        assert pooling.to(*arguments) is pooling
    assert pooling.to(dtype=torch.float16) is pooling
    assert {p.dtype for p in pooling.parameters()} == {torch.float32}
    assert pooling.to("meta", torch.float16).selector.down.weight.device.type == "meta"
    with pytest.raises(TypeError):
        pooling.to("cpu", precision=16)
    assert {p.dtype for p in make_sentences(folder, torch.float32, torch.float32).half().parameters()} == {
        torch.float16
    }
