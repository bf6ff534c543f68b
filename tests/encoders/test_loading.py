"""A saved SentenceTransformer with S2SentPooling is opened by sentence-transformers itself, in any form that the library has:
Routers, pickles, pools of processes, threads, compiled; and its README says how."""

import copy
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402

SentenceTransformer = sentence_transformers.SentenceTransformer
RELEASE = tuple(map(int, sentence_transformers.__version__.split(".")[:2]))
SAVED = Path(__file__).parents[1] / "data" / "sentence_transformer"  # by earlier code; 4 blocks of 16 features
TEXTS = ["the cat sat on the mat", "a dog ran", "moon", "the old moon is bright"]


def equal(one, other):
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def opened(folder, **options):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def pooling_behind(transformer, seed, blocks="last:2"):
    torch.manual_seed(seed)
    module = S2SentPooling.behind(transformer, blocks, bottleneck=4, block_prior=True)
    with torch.no_grad():
        module.selector.block_prior.uniform_(-1, 1)
    return module


@pytest.fixture(scope="module")
def wanted():
    return load(SAVED, device="cpu").encode(TEXTS)


def test_a_folder_by_earlier_code_opens_and_encodes(wanted):
    model = opened(SAVED)
    assert equal(model.encode(TEXTS), wanted)
    assert model[1].listener.called is model[0]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[1].listener.called is again[0]
        assert equal(again.encode(TEXTS), wanted)
    assert equal(SentenceTransformer(modules=list(model), device="cpu").encode(TEXTS), wanted)


def test_threads():
    model = opened(SAVED)
    barrier, found = threading.Barrier(2, timeout=60), {}

    def work(number):
        barrier.wait()
        found[number] = [model.encode(TEXTS[number:]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        expected = model.encode(TEXTS[number:])
        assert all(equal(one, expected) for one in found[number])


def test_compiled(wanted):
    model = opened(SAVED)
    model[1].selector.backend = "reference"
    torch._dynamo.reset()
    model.compile(backend="eager", dynamic=True)
    for _ in range(2):
        torch.testing.assert_close(torch.as_tensor(model.encode(TEXTS)), torch.as_tensor(wanted))
    torch._dynamo.reset()


# ---------------------------------------------------------------- Routers and what follows the pooling


def tails(model):
    """Modules behind the pooling, and the embeddings that they make of its own."""
    torch.manual_seed(5)
    dense = Dense(16, 6)
    with torch.no_grad():
        made = torch.nn.functional.normalize(dense.activation_function(dense.linear(torch.as_tensor(model))), dim=1)
    return [dense, Normalize()], made


def test_modules_behind_the_pooling(tmp_path, wanted):
    saved, (modules, expected) = load(SAVED, device="cpu"), tails(wanted)
    SentenceTransformer(modules=[*saved, *modules], device="cpu").save(str(tmp_path), create_model_card=False)
    for model in (load(tmp_path, device="cpu"), opened(tmp_path)):
        assert model.get_embedding_dimension() == 6
        torch.testing.assert_close(torch.as_tensor(model.encode(TEXTS)), expected)


@pytest.mark.parametrize(("shared", "nested"), [(True, False), (False, False), (False, True)])
def test_a_router_with_a_pooling_in_each_route(shared, nested, tmp_path):
    """Both behind one transformer, or each behind its own."""
    one = Transformer(str(SAVED))
    other = one if shared else copy.deepcopy(one)
    poolings = [pooling_behind(one, 1), pooling_behind(other, 2, [0, 1, 3])]
    alone = [SentenceTransformer(modules=[t, p], device="cpu") for t, p in zip((one, other), poolings, strict=True)]
    query, document = (model.encode(TEXTS) for model in alone)
    assert not equal(query, document)
    router = Router.for_query_document(
        [one, poolings[0]], [Router({"text": [other, poolings[1]]})] if nested else [other, poolings[1]]
    )
    model = SentenceTransformer(modules=[router], device="cpu")
    model.save(str(tmp_path), create_model_card=False)
    for again in (model, copy.deepcopy(model), load(tmp_path, device="cpu"), opened(tmp_path)):
        loaded = again[0].sub_modules
        # Before release 6.2 of sentence-transformers a shared module may be saved once for each route.
        if RELEASE >= (6, 2) or again is model or not shared:
            assert (loaded["query"][0] is loaded["document"][0]) == shared
        assert type(again[0]) is Router
        for _ in range(2):
            assert equal(again.encode_query(TEXTS), query)
            assert equal(again.encode_document(TEXTS), document)


def test_a_pooling_behind_a_router_follows_the_transformer_of_each_route(tmp_path):
    query, document = Transformer(str(SAVED)), Transformer(str(SAVED))
    with torch.no_grad():
        document.auto_model.embeddings.word_embeddings.weight.mul_(1.5)
    pooling = pooling_behind(query, 1)
    wanted = SentenceTransformer(modules=[query, pooling], device="cpu").encode(TEXTS)
    nested = Router({"text": [document]})
    model = SentenceTransformer(modules=[Router.for_query_document([query], [nested]), pooling], device="cpu")
    assert [listener.called for listener in pooling._listeners] == [query, document]
    others = model.encode_document(TEXTS)
    assert equal(model.encode_query(TEXTS), wanted) and not equal(others, wanted)
    with torch.no_grad():  # heard, but not taken: the next call is the one that counts
        document(model.preprocess(TEXTS[:1], task="document"))
    assert equal(model.encode_query(TEXTS), wanted)
    model.save(str(tmp_path), create_model_card=False)
    again = opened(tmp_path)
    assert equal(again.encode_query(TEXTS), wanted) and equal(again.encode_document(TEXTS), others)
    assert [listener.called for listener in pooling._listeners] == [query, document]


def test_a_transformer_that_does_not_fit_leaves_the_old_one_followed():
    model = load(SAVED, device="cpu")
    wanted, other = model.encode(TEXTS), Transformer(str(SAVED), config_kwargs={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="blocks: expected indices"):
        model[1].attach(other)
    assert not other._forward_hooks and not other._forward_pre_hooks
    assert equal(model.encode(TEXTS), wanted)
    model[1].attach()
    with pytest.raises(RuntimeError, match="does not know its transformer: expected one before it in the modules"):
        model.encode(TEXTS)


# ---------------------------------------------------------------- what load passes on


def test_the_options_of_load_mean_what_they_mean_in_sentence_transformers(wanted, tmp_path):
    options = {
        "model_kwargs": {"dtype": torch.float64, "attn_implementation": "eager"},
        "processor_kwargs": {"model_max_length": 4},
        "config_kwargs": {"hidden_act": "relu"},
        "truncate_dim": 5,
        "prompts": {"query": "a "},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "device": "cpu",
    }
    for model in (load(SAVED, **options), SentenceTransformer(str(SAVED), trust_remote_code=True, **options)):
        encoder = model[0].auto_model
        assert encoder.dtype == torch.float64 and model[1].selector.down.weight.dtype == torch.float32
        assert encoder.config._attn_implementation == "eager" and encoder.config.hidden_act == "relu"
        assert model.max_seq_length == 4 and model.truncate_dim == 5
        assert model.prompts == {"query": "a ", "document": ""} and model.similarity_fn_name == "dot"
        assert equal(model.encode("moon", prompt_name="query"), model.encode("a moon", prompt=""))
        assert model.encode(TEXTS).shape == (4, 5)
    assert load(SAVED, device="cpu").prompts == {"query": "the old ", "document": ""}
    router = Router({"text": [Transformer(str(SAVED))]})
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path), create_model_card=False)
    config = tmp_path / "router_config.json"
    config.write_text(config.read_text().replace("sentence_transformers.base.modules.transformer", "somebody.else"))
    with pytest.raises(ValueError, match=r"got 'somebody\.else\.Transformer'"):
        load(tmp_path)


# ---------------------------------------------------------------- the README


def snippets(folder):
    return re.findall(r"^```(bash|python)\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("prompts", [{}, {"query": "the old "}], ids=["one prompt", "query and document"])
def test_the_readme_of_a_saved_model_runs(prompts, tmp_path, monkeypatch):
    model = SentenceTransformer(modules=list(load(SAVED, device="cpu")), device="cpu", prompts=prompts)
    model.save(str(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    code = dict(snippets(tmp_path / "moved"))
    assert "s2sent_kernels[sentence-transformers]" in code["bash"]
    monkeypatch.chdir(tmp_path / "moved")
    found = {}
    exec(compile(code["python"], "README.md", "exec"), found)
    model.to(found["model"].device)  # of the reader's machine
    if prompts:
        assert equal(found["query_embeddings"], model.encode_query(found["queries"]))
        assert equal(found["document_embeddings"], model.encode_document(found["documents"]))
    else:
        assert equal(found["embeddings"], model.encode(found["sentences"]))


def test_the_readme_names_the_model_that_is_pushed(tmp_path):
    model = load(SAVED, device="cpu")
    model.save(str(tmp_path / "one"), model_name="somebody/model")
    model = load(SAVED, device="cpu")
    model.save(str(tmp_path / "two"))
    again = opened(tmp_path / "two")
    again.model_card_data.set_model_id("somebody/model")
    again.save(str(tmp_path / "three"))
    for name in ("one", "three"):
        code = dict(snippets(tmp_path / name))["python"]
        assert 'SentenceTransformer("somebody/model", trust_remote_code=True)' in code


def test_a_card_of_the_callers_own_class_is_kept():
    base = sentence_transformers.SentenceTransformerModelCardData

    class Card(base):
        pass

    modules = list(load(SAVED, device="cpu"))
    for card in (Card(), base(license="mit")):
        model = SentenceTransformer(modules=modules, device="cpu", model_card_data=card)
        assert model.model_card_data is card and isinstance(card, base)
        assert (type(card) is Card) == (card.license is None)
