"""The poolings of sentence-transformers in S2SentPooling: each is that of the library's own module on the fused tokens."""

import itertools

import pytest
import torch

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights  # noqa: E402
from test_sentence_transformers import TEXTS, SentenceTransformer, equal, make_model, run  # noqa: E402

from s2sent_kernels import S2SentSelector, functional, pooling_modes  # noqa: E402
from s2sent_kernels.export import as_pipeline, export_onnx  # noqa: E402
from s2sent_kernels.features import Counted, Stream, pool  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402

N, D, L, PROMPT = 3, 16, 9, 2
LINEAR = ("mean", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean")
JOINED = (
    ("mean", "cls"),
    ("cls", "lasttoken"),
    ("lasttoken", "mean_sqrt_len_tokens", "mean"),
    ("weightedmean", "cls", "lasttoken"),
    LINEAR,
)
WITH_MAX = ("max", ("max", "mean"), ("weightedmean", "max", "cls"))
LENGTHS = (9, 4, 1, 7)
every = pytest.mark.parametrize("modes", [*LINEAR, *JOINED, *WITH_MAX], ids=str)
layouts = pytest.mark.parametrize("layout", ["right", "left", "without a mask", "packed"])


def make_features(layout):
    mask = torch.zeros(len(LENGTHS), L, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, (slice(L - length, None) if layout == "left" else slice(length))] = 1
    if layout == "without a mask":
        return {}
    if layout == "packed":
        return {"cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)}
    return {"attention_mask": mask}


def make_states(layout, dtype=torch.float64, requires_grad=False):
    """Padding holds numbers that must not count."""
    shape = (1, sum(LENGTHS), D) if layout == "packed" else (len(LENGTHS), L, D)
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(N)]


def make_selector(dtype=torch.float64, **options):
    torch.manual_seed(1)
    selector = S2SentSelector(D, N, 8, 4, block_prior=True, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        selector.up.weight.mul_(8)
    return selector.to(dtype)


def by_the_library(selector, modes, features, include_prompt, states):
    """Pooling on v."""
    tokens = Counted.of(features, include_prompt)
    if "cu_seq_lens_q" in features and tokens.kept is not None:  # v of the tokens that count, in the place of all
        fused = torch.zeros_like(states[0][0])
        counted = selector([tokens.select(state) for state in states], cu_seqlens=tokens.cu_seqlens)
        fused = fused.index_put((tokens.kept.nonzero()[:, 0],), counted)[None]
    else:
        chosen = [tokens.select(state) for state in states]
        fused = selector(chosen, tokens.attention_mask, cu_seqlens=tokens.cu_seqlens)
        fused = fused[None] if fused.dim() == 2 else fused
    pooling = Pooling(D, modes, include_prompt=include_prompt)
    return pooling({**features, "token_embeddings": fused})["sentence_embedding"]


@every
@layouts
@pytest.mark.parametrize("include_prompt", [True, False])
@torch.no_grad()
def test_each_is_the_librarys_on_fused_tokens(modes, layout, include_prompt):
    features = {**make_features(layout), "prompt_length": PROMPT}  # one of the texts has no token beside the prompt's
    if layout == "without a mask":
        del features["prompt_length"]
    states, selector = make_states(layout), make_selector()
    found = pool(selector, modes, features, include_prompt, states)
    assert found.shape == (len(LENGTHS), D if isinstance(modes, str) else len(modes) * D)
    wanted = by_the_library(selector, modes, features, include_prompt, states)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_as_exact_as_the_librarys(layout, dtype):
    """The error against float64 is at most twice that of fused tokens and Pooling in the same dtype."""
    features, modes = make_features(layout), (*LINEAR, "max")
    states = make_states(layout, dtype)
    exact = pool(make_selector(), modes, features, True, [state.double() for state in states])
    selector = make_selector(torch.float32)
    found = pool(selector, modes, features, True, states)
    theirs = by_the_library(selector, modes, features, True, states)
    assert found.dtype == theirs.dtype == dtype
    for column in range(len(modes)):
        error, yardstick = (
            (each.double() - exact)[:, column * D : (column + 1) * D].square().mean().sqrt() for each in (found, theirs)
        )
        assert error <= 2 * yardstick, modes[column]


@pytest.mark.parametrize("modes", [("mean", "cls"), LINEAR, (*LINEAR, "max")], ids=str)
@layouts
def test_gradients_are_those_through_fused_tokens(modes, layout):
    features, selector = make_features(layout), make_selector()
    weights = torch.randn(len(LENGTHS), len(modes) * D, dtype=torch.float64)
    found = []
    for compute in (pool, by_the_library):
        states = make_states(layout, requires_grad=True)
        selector.zero_grad()
        (compute(selector, modes, features, True, states) * weights).sum().backward()
        found.append([tensor.grad.clone() for tensor in (*states, *selector.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("modes", [*LINEAR, *JOINED], ids=str)
@layouts
@torch.no_grad()
def test_block_by_block_with_the_same_bits(modes, layout, backend, streamed):
    features, states = make_features(layout), make_states(layout, torch.float32)
    module = S2SentPooling(
        {"hidden_size": D, "num_blocks": N, "bottleneck": 8, "backend": backend}, range(N), pooling=modes
    )
    module.eval()
    stream = Stream(module, features)
    for block, state in enumerate(states):
        stream.add(block, state)
    assert equal(stream.result(features), pool(module.selector, modes, features, True, states))


def test_one_squeeze_and_one_gate(monkeypatch):
    """In training each call is one batch of the gate's statistics."""
    features, states, selector = make_features("left"), make_states("left"), make_selector().train()
    squeezed, squeeze = [], functional.squeeze_batch
    monkeypatch.setattr(functional, "squeeze_batch", lambda *args: squeezed.append(args) or squeeze(*args))
    pool(selector, (*LINEAR, "max"), features, True, states)
    assert len(squeezed) == 1 and selector.norm.num_batches_tracked == 1


@torch.no_grad()
def test_texts_without_tokens():
    features = {"attention_mask": torch.zeros(2, L, dtype=torch.int64)}
    states = [state[:2] for state in make_states("left")]
    for mode in LINEAR:
        assert equal(pool(make_selector(), mode, features, True, states), torch.zeros(2, D, dtype=torch.float64))
    empty = [state[:, :0] for state in states]
    for mode in LINEAR:
        found = pool(make_selector(), (mode, "cls"), {"attention_mask": torch.zeros(2, 0)}, True, empty)
        assert equal(found, torch.zeros(2, 2 * D, dtype=torch.float64))


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("modes", ["lasttoken", "max", ["mean", "cls", "weightedmean"]], ids=str)
def test_in_a_model_that_is_saved_and_loaded(modes, tmp_path, kept_or_streamed):
    model = make_model(pooling=modes)
    size = 384 if isinstance(modes, str) else 384 * len(modes)
    assert model.get_embedding_dimension() == size
    expected = model.encode(TEXTS)
    assert expected.shape == (len(TEXTS), size)
    features = model.preprocess(TEXTS)
    assert equal(run(model, features, torch.enable_grad).detach(), run(model, features, torch.no_grad))
    model.save(str(tmp_path))
    again = load(tmp_path, device="cpu")
    assert again[1].pooling == modes and equal(again.encode(TEXTS), expected)


def test_embeddings_of_several_are_those_of_each():
    together = torch.as_tensor(make_model(pooling=LINEAR).encode(TEXTS))
    for column, mode in enumerate(LINEAR):
        alone = torch.as_tensor(make_model(pooling=mode).encode(TEXTS))
        torch.testing.assert_close(together[:, column * 384 : (column + 1) * 384], alone)


def test_the_attributes_of_a_pooling():
    """Code that looks for a Pooling among a model's modules reads them, and sets the mode."""
    model = make_model(pooling=["mean", "last"])
    theirs = Pooling(384, ("mean", "lasttoken"))
    for name in ("pooling_mode", "embedding_dimension", "pooling_output_dimension"):
        assert getattr(model[1], name) == getattr(theirs, name)
    assert make_model(pooling="last")[1].pooling_mode == "lasttoken"
    model[1].pooling_mode = "cls"
    assert model[1].pooling == "cls" and equal(model.encode(TEXTS), make_model(pooling="cls").encode(TEXTS))
    with pytest.raises(ValueError, match="got 'median'"):
        model[1].pooling_mode = "median"
    assert model[1].pooling == "cls"


def test_other_names_are_refused():
    arguments = {"hidden_size": D, "num_blocks": N}
    for pooling, error, message in (
        ("median", ValueError, r"pooling: expected one of \('mean', .*'max'\), got 'median'"),
        (("mean", "median"), ValueError, "got 'median'"),
        ((), ValueError, "pooling: expected at least one of .* got none"),
        (3, TypeError, "pooling: expected a name or a sequence of names, got 3"),
        (("mean", None), TypeError, "pooling: expected a name or a sequence of names"),
    ):
        with pytest.raises(error, match=message):
            S2SentPooling(arguments, range(N), pooling=pooling)


def test_a_graph_has_one_of_the_selectors_own_poolings(tmp_path):
    assert as_pipeline(make_model(pooling="lasttoken")).pooling == "last"
    for pooling in ("weightedmean", ["mean", "cls"]):
        with pytest.raises(ValueError, match=r"whose pooling is one of \('mean', 'cls', 'last'\), got"):
            export_onnx(make_model(pooling=pooling), tmp_path / "model.onnx")


def test_tokens_that_another_module_has_weighted_are_refused():
    """Its weights would not reach the blocks' hidden states."""
    model = make_model()
    vocabulary = [str(number) for number in range(model.tokenizer.vocab_size)]
    weights = WordWeights(vocabulary, dict.fromkeys(vocabulary, 0.5))
    weighted = SentenceTransformer(modules=[model[0], weights, model[1]], device="cpu")
    with pytest.raises(ValueError, match="no module between the transformer and S2SentPooling that weights tokens"):
        weighted.encode(TEXTS)


def test_the_names_are_those_of_the_library():
    assert set(Pooling.POOLING_MODES) == {*pooling_modes.MODES} - {"last"}
