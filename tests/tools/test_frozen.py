"""Cache, training from it, and selectors in folders: on a tiny random encoder."""

import json
import os
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, cache, frozen, squeeze
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.checkpoints import pretrained
from s2sent_kernels.formula.call import POOLINGS

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def encoder_and_tokenizer():
    return make_encoder_and_tokenizer()


SETTINGS = cache.Settings(token_frequencies=7, batch_size=3, max_length=32)

# ---------------------------------------------------------------- cache


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "texts: expected a sequence of strings, or of tuples of two, got str"),
        ({"a": "b"}, "texts: expected a sequence of strings, or of tuples of two, got dict"),
        (["a", None], "texts: expected strings, or tuples of two, got NoneType as text 1"),
        (["a", ["b", "c"]], "texts: expected strings, or tuples of two, got list as text 1"),
        ([("a", "b"), ("a", "b", "c")], "texts: expected strings, or tuples of two, got tuple as text 1"),
        (["a", ("b", "c")], "texts: expected strings or pairs of them alone, got both, text 1 as the first"),
    ],
)
def test_texts_that_cannot_be(encoder_and_tokenizer, tmp_path, texts, message):
    with pytest.raises(TypeError, match=message):
        cache.make(*encoder_and_tokenizer, texts, tmp_path / "cache", SETTINGS)
    assert not (tmp_path / "cache").exists()


def test_a_file_in_place_of_the_folder(encoder_and_tokenizer, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "cache"):
        with pytest.raises(ValueError, match=f"folder: expected a folder, got a file, {file}$"):
            cache.make(*encoder_and_tokenizer, TEXTS, folder, SETTINGS)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("num_blocks", "frequencies"), [(1, 1), (1, 4), (2, 8), (3, 2), (4, 16), (4, 4)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_f_and_p_of_the_cache_are_those_of_the_hidden_states(
    num_blocks, frequencies, pooling, encoder_and_tokenizer, tmp_path
):
    encoder, tokenizer = encoder_and_tokenizer
    made = cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(pooling=pooling))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with BlockCapture(encoder, f"last:{num_blocks}") as capture, torch.no_grad():
        states = [state.double() for state in capture.collect(**batch)]
    f, p = squeeze(states, batch["attention_mask"], frequencies=frequencies, pooling=pooling, backend="reference")
    rows = made.rows(TEXTS)
    torch.testing.assert_close(made.squeezed(num_blocks, frequencies, rows).double(), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.pooled(num_blocks, rows).double(), p, rtol=1e-5, atol=1e-5)


def test_pairs_are_encoded_as_one_input(encoder_and_tokenizer, tmp_path):
    """With the tokenizer's token types, and cut as the tokenizer cuts a pair."""
    import tokenizers

    encoder, tokenizer = encoder_and_tokenizer[0], make_encoder_and_tokenizer()[1]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[3], TEXTS[7]), (TEXTS[7], TEXTS[7]), (TEXTS[1], TEXTS[0])]
    made = cache.make(encoder, tokenizer, pairs, tmp_path, SETTINGS._replace(max_length=20))
    one, other = zip(*pairs, strict=True)
    batch = tokenizer(list(one), list(other), padding=True, truncation=True, max_length=20, return_tensors="pt")
    assert batch["token_type_ids"].any() and batch["attention_mask"].sum(1).max() == 20
    with BlockCapture(encoder) as capture, torch.no_grad():
        f, p = squeeze(capture.collect(**batch), batch["attention_mask"], pooling="mean", backend="reference")
    torch.testing.assert_close(made.squeezed(4, 4, made.rows(pairs)), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.pooled(4, made.rows(pairs)), p, rtol=1e-5, atol=1e-5)


def test_a_second_pass_opens_the_first(encoder_and_tokenizer, tmp_path, monkeypatch):
    encoder, tokenizer = encoder_and_tokenizer
    first = cache.make(encoder, tokenizer, [*TEXTS, TEXTS[0]], tmp_path, SETTINGS)
    assert len(first) == len(TEXTS)
    monkeypatch.setattr(cache, "_fill", None)
    again = cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS)
    assert again.folder == first.folder
    assert isinstance(again._kept, numpy.memmap)
    assert again.row(TEXTS[3]) == 3
    assert json.loads((first.folder / "about.json").read_text())["blocks"] == [0, 1, 2, 3]
    assert sorted(path.name for path in first.folder.iterdir()) == ["about.json", "frequencies.npy", "lengths.npy"]


def test_every_setting_the_texts_and_the_weights_make_another_cache(encoder_and_tokenizer, tmp_path):
    encoder, tokenizer = encoder_and_tokenizer
    other, _ = make_encoder_and_tokenizer()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    folders = [
        cache.make(*arguments).folder
        for arguments in (
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS),
            (encoder, tokenizer, TEXTS[:-1], tmp_path, SETTINGS),
            (other, tokenizer, TEXTS, tmp_path, SETTINGS),
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(blocks="last:2")),
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(max_length=5)),
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(token_frequencies=2)),
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(pooling="cls")),
            (encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(block_norm="layernorm")),
        )
    ]
    assert len(set(folders)) == len(folders)


def test_an_interrupted_pass_goes_on_and_gives_the_same_bits(encoder_and_tokenizer, tmp_path, monkeypatch):
    encoder, tokenizer = encoder_and_tokenizer
    whole = cache.make(encoder, tokenizer, TEXTS, tmp_path / "whole", SETTINGS)
    monkeypatch.setattr(cache, "RECORD_EVERY", 1)
    summaries, calls = cache._summaries, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return summaries(*arguments)

    monkeypatch.setattr(cache, "_summaries", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        cache.make(encoder, tokenizer, TEXTS, tmp_path / "cut", SETTINGS)
    assert not (tmp_path / "cut" / whole.folder.name).exists()
    resumed = cache.make(encoder, tokenizer, TEXTS, tmp_path / "cut", SETTINGS)
    assert len(calls) == 4  # three batches of eight texts: two were kept, the third ran again
    for name in ("frequencies.npy", "lengths.npy"):
        assert numpy.array_equal(numpy.load(resumed.folder / name), numpy.load(whole.folder / name))


def test_a_full_disk_is_an_error_and_leaves_nothing(encoder_and_tokenizer, tmp_path, monkeypatch):
    """The disk space is allocated first, before the encoder runs for hours."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*frequencies\.npy"):
        cache.make(*encoder_and_tokenizer, TEXTS, tmp_path, SETTINGS)
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())


def test_the_encoders_mode_comes_back(tmp_path):
    encoder, tokenizer = make_encoder_and_tokenizer()
    encoder.train()
    cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS)
    assert encoder.training
    assert not any(module._forward_hooks for module in encoder.modules())


def test_what_a_cache_refuses(encoder_and_tokenizer, tmp_path):
    encoder, tokenizer = encoder_and_tokenizer
    with pytest.raises(ValueError, match="texts: expected at least one"):
        cache.make(encoder, tokenizer, [], tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="pooling: expected one of"):
        cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(pooling="max"))
    made = cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS._replace(token_frequencies=2))
    with pytest.raises(ValueError, match="needs 4 token frequencies, got a cache of 2"):
        made.squeezed(1, 4)
    with pytest.raises(ValueError, match="num_blocks: expected at most 4"):
        made.pooled(5)


# ---------------------------------------------------------------- training


def _features(rows=96, num_blocks=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return frozen.Features(
        torch.randn(rows, size, generator=generator), torch.randn(rows, num_blocks, size, generator=generator)
    )


def test_embed_is_the_selectors_pool(encoder_and_tokenizer, tmp_path):
    encoder, tokenizer = encoder_and_tokenizer
    selector = S2SentSelector(16, 4, 4, 4, block_prior=True, backend="reference").eval()
    made = cache.make(encoder, tokenizer, TEXTS, tmp_path, SETTINGS)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with BlockCapture(encoder) as capture, torch.no_grad():
        expected = capture.pool(selector, **batch)
    features = frozen.Features.of(made, 4, 4, made.rows(TEXTS))
    torch.testing.assert_close(frozen.embed_all(selector, features), expected, rtol=1e-5, atol=1e-5)


def test_info_nce_against_its_formula():
    anchor, positive, negative = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 4, 3))
    total = 0.0
    for i in range(4):
        logits = [F.cosine_similarity(anchor[i], other, dim=0) / 0.05 for other in (*positive, *negative)]
        total = total + torch.logsumexp(torch.stack(logits), 0) - logits[i]
    torch.testing.assert_close(frozen.info_nce(anchor, positive, negative, 0.05), total / 4)


@pytest.mark.parametrize("kind", ["selector", "mix"])
def test_training_lowers_the_loss_and_repeats_bit_for_bit(kind):
    features = _features()
    # The first block encodes which sentences belong together; the others are noise.
    anchor, positive = torch.arange(0, 32), torch.arange(32, 64)
    features.pooled[positive, 0] = features.pooled[anchor, 0]
    negative = torch.arange(64, 96).where(torch.arange(32) % 4 > 0, -1)

    def run():
        torch.manual_seed(1)
        module = frozen.ScalarMix(3) if kind == "mix" else S2SentSelector(8, 3, 4, 4, block_prior=True)
        recipe = frozen.Recipe(epochs=8, batch_size=16, learning_rate=1e-2, prior_learning_rate=0.3)
        return module, frozen.train(module, features, anchor, positive, negative, recipe)

    (module, history), (other, again) = run(), run()
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert module.block_prior.argmax() == 0
    assert history == again
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_the_best_epoch_is_kept():
    values = iter([9.0, 1.0, 3.0, 2.0])
    states = []

    def score(module):
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return next(values)

    module = S2SentSelector(8, 3, 4, 4)
    recipe = frozen.Recipe(epochs=3, batch_size=16)
    history = frozen.train(module, _features(), torch.arange(32), torch.arange(32, 64), None, recipe, score=score)
    assert (history.kept, history.scores) == (2, [9.0, 1.0, 3.0, 2.0])
    assert all(torch.equal(states[2][name], tensor) for name, tensor in module.state_dict().items())
    assert not torch.equal(states[3]["up.weight"], module.up.weight)


def test_cosent_against_its_formula():
    similarity, gold = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64), torch.tensor([1.0, 3.0, 3.0])
    # The first pair's score is lower than both others': two terms.
    expected = torch.log(1 + torch.exp(torch.tensor((0.9 - 0.2) / 0.1)) + torch.exp(torch.tensor((0.9 - 0.5) / 0.1)))
    torch.testing.assert_close(frozen.cosent(similarity, gold, 0.1), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scored_pairs_teach_which_block_says_the_score(loss):
    features = _features()
    rows = torch.arange(96).view(48, 2)
    gold = 5 * F.cosine_similarity(features.pooled[rows[:, 0], 0], features.pooled[rows[:, 1], 0])
    module = frozen.ScalarMix(3)
    dev = frozen.Dev(features, rows[:, 0], rows[:, 1], gold.tolist())
    recipe = frozen.Recipe(epochs=20, batch_size=16, prior_learning_rate=0.3)
    history = frozen.train_scored(module, features, rows, gold, recipe, loss=loss, score=dev)
    assert history.score > 90 > history.scores[0] + 20 and module.block_prior.argmax() == 0
    with pytest.raises(ValueError, match="gold: expected finite and different scores"):
        frozen.train_scored(module, features, rows, torch.ones(48), recipe, loss=loss)


def test_a_symmetric_loss_is_the_mean_of_both_directions():
    anchor, positive, negative = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 4, 3))
    one = frozen.info_nce(anchor, positive, negative, 0.05)
    other = frozen.info_nce(positive, anchor, None, 0.05)
    torch.testing.assert_close(frozen.info_nce(anchor, positive, negative, 0.05, symmetric=True), (one + other) / 2)


def test_a_loss_of_several_widths_is_their_mean(monkeypatch):
    features, seen = _features(), []

    def info_nce(*parts_and_options):
        seen.append(tuple(part.shape[1] for part in parts_and_options[:2]))
        return (0.0 * parts_and_options[0].sum()) + len(seen)

    monkeypatch.setattr(frozen, "info_nce", info_nce)
    rows = torch.arange(64)
    recipe = frozen.Recipe(epochs=1, batch_size=32, widths=(2, 5))
    history = frozen.train(S2SentSelector(8, 3, 4, 4), features, rows[:32], rows[32:], None, recipe)
    assert seen == [(2, 2), (5, 5), (8, 8)] and history.losses == [2.0]
    for widths, message in (((8,), "widths: expected fewer than all 8 features, got 8"), ((0,), "widths: expected")):
        with pytest.raises(ValueError, match=message):
            frozen.train(
                S2SentSelector(8, 3, 4, 4), features, rows[:32], rows[32:], None, recipe._replace(widths=widths)
            )


def test_patience_stops_a_training():
    values = iter([9.0, 1.0, 3.0, 2.0, 2.0, 4.0])
    recipe = frozen.Recipe(epochs=9, batch_size=16, patience=2)
    rows = torch.arange(64)
    history = frozen.train(
        S2SentSelector(8, 3, 4, 4), _features(), rows[:32], rows[32:], None, recipe, score=lambda _: next(values)
    )
    assert (history.kept, len(history.losses)) == (2, 4) and not history.rising
    assert history._replace(kept=4).rising


@pytest.mark.parametrize("count, of_an_epoch", [(32, 2), (39, 2), (40, 3)])
def test_all_steps_are_counted(count, of_an_epoch):
    """A last batch that is less than half full is dropped, and counts for nothing."""
    values, told = iter([0.0, 1.0, 3.0, 2.0]), []
    rows, recipe = torch.arange(2 * count), frozen.Recipe(epochs=3, batch_size=16)
    features = _features(2 * count)
    history = frozen.train(
        S2SentSelector(8, 3, 4, 4),
        features,
        rows[:count],
        rows[count:],
        None,
        recipe,
        score=lambda _: next(values),
        told=told.append,
    )
    assert history.kept == 2 and history.steps == 3 * of_an_epoch == told[-1].step


def test_prior_and_scale_have_their_own_learning_rate():
    module = S2SentSelector(8, 3, 4, 4, block_prior=True, gate_scale=4.0, backend="reference")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rows, recipe = torch.arange(64), frozen.Recipe(epochs=1, batch_size=32, prior_learning_rate=0.5)
    frozen.train(module, _features(), rows[:32], rows[32:], None, recipe._replace(learning_rate=1e-6))
    moved = {name: (tensor.detach() - before[name]).abs().max().item() for name, tensor in module.named_parameters()}
    assert moved.pop("block_prior") > 0.4 and moved.pop("gate_scale") > 0.4 and max(moved.values()) < 1e-5


def test_fit_from_texts(encoder_and_tokenizer, tmp_path):
    pytest.importorskip("scipy")
    encoder, tokenizer = encoder_and_tokenizer
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    triplets = [(TEXTS[i], TEXTS[(i + 1) % 8], TEXTS[(i + 3) % 8] if i % 2 else None) for i in range(8)]
    dev = [(TEXTS[i], TEXTS[i + 1], numpy.float32(i)) for i in range(5)]
    selector = S2SentSelector(16, 4, 4, 4, block_prior=True)
    start = selector.up.weight.clone()
    recipe = frozen.Recipe(epochs=2, batch_size=4)
    history = frozen.fit(
        encoder, tokenizer, selector, triplets, folder=tmp_path, dev=dev, recipe=recipe, settings=SETTINGS
    )
    assert len(history.losses) == 2
    assert len(history.scores) == 3
    assert not torch.equal(start, selector.up.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    with pytest.raises(ValueError, match="selector: expected hidden_size = 16"):
        frozen.fit(encoder, tokenizer, S2SentSelector(8, 4, 4, 4), triplets, folder=tmp_path, settings=SETTINGS)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"anchor": "a", "positive": "b"}] * 2, r"examples\[0\]: expected a tuple, got dict"),
        (["ab", "cd"], r"examples\[0\]: expected a tuple, got str"),
        ({"a": "b", "c": "d"}, "examples: expected a sequence of tuples, got dict"),
        (iter([("a", "b")]), "examples: expected a sequence of tuples, got list_iterator"),
        ([("a", "b"), ("a",)], r"examples\[1\]: expected anchor and positive at least, got 1"),
        ([("a", "b"), ("a", "b", "c")], r"examples\[1\]: expected 2 texts, as examples\[0\] has, got 3"),
        ([("a", "b"), ("a", None)], r"examples\[1\]: expected positive to have a text, got None"),
        ([("", "b"), ("a", "b")], r"examples\[0\]: expected anchor to have a text, got ''"),
        ([("a", "b", 3), ("a", "b", None)], r"examples\[0\]: expected a string as negative, got int"),
        ([("a", ["b"]), ("a", "b")], r"examples\[0\]: expected a string as positive, got list"),
    ],
)
def test_examples_that_cannot_be(encoder_and_tokenizer, tmp_path, examples, message):
    with pytest.raises((TypeError, ValueError), match=message):
        frozen.fit(*encoder_and_tokenizer, S2SentSelector(16, 4, 4, 4), examples, folder=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("dev", "message"),
    [
        (["abc"], r"dev\[0\]: expected a tuple, got str"),
        ([("a", "b")], r"dev\[0\]: expected \(sentence, sentence, score\), got 2 values"),
        ([("a", None, 1.0)], r"dev\[0\]: expected a string as sentence, got NoneType"),
        ([("a", "b", "1.0")], r"dev\[0\]: score: expected a number"),
        ([("a", "b", float("nan"))], r"dev\[0\]: score: expected a finite number"),
    ],
)
def test_dev_that_cannot_be(encoder_and_tokenizer, tmp_path, dev, message):
    encoder, tokenizer = encoder_and_tokenizer
    examples = [("a", "b"), ("c", "d")]
    with pytest.raises((TypeError, ValueError), match=message):
        frozen.fit(encoder, tokenizer, S2SentSelector(16, 4, 4, 4), examples, folder=tmp_path / "cache", dev=dev)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"temperature": float("nan")}, "temperature"),
        ({"learning_rate": float("inf")}, "learning_rate"),
    ],
)
def test_recipes_that_cannot_be(change, message):
    rows = torch.arange(4)
    with pytest.raises(ValueError, match=f"{message}: expected a positive number"):
        frozen.train(frozen.ScalarMix(3), _features(), rows, rows, None, frozen.Recipe()._replace(**change))


def test_training_that_diverges_is_an_error():
    recipe = frozen.Recipe(epochs=3, batch_size=16, temperature=1e-300)
    with pytest.raises(ValueError, match=r"training diverged, .* is not finite any more"):
        frozen.train(S2SentSelector(8, 3, 4, 4), _features(), torch.arange(32), torch.arange(32, 64), None, recipe)


def test_a_score_that_is_none_is_below_every_other():
    values = iter([1.0, float("nan"), 3.0, float("nan")])
    module, recipe = S2SentSelector(8, 3, 4, 4), frozen.Recipe(epochs=3, batch_size=16)
    rows = torch.arange(64)
    history = frozen.train(module, _features(), rows[:32], rows[32:], None, recipe, score=lambda _: next(values))
    assert history.kept == 2


def test_one_triplet_is_too_few():
    with pytest.raises(ValueError, match="anchor: expected at least two"):
        frozen.train(frozen.ScalarMix(3), _features(), torch.arange(1), torch.arange(1))


def test_a_mix_of_weights():
    mix = frozen.ScalarMix.of_weights([1.0, 1.0, 2.0])
    torch.testing.assert_close(mix(torch.eye(3)[None])[0], torch.tensor([0.25, 0.25, 0.5]))
    with pytest.raises(ValueError, match="weights: expected positive numbers"):
        frozen.ScalarMix.of_weights([1.0, 0.0])


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "options", [{"block_prior": True}, {"gate_norm": None, "activation": "relu"}, {"profile": "official"}]
)
def test_saved_and_loaded_has_the_same_bits(options, tmp_path):
    pytest.importorskip("safetensors")
    selector = S2SentSelector(16, 3, 4, 2, **options)
    hidden_states = [torch.randn(4, 5, 16) for _ in range(3)]
    selector.pool(hidden_states)  # moves the running statistics
    selector.save_pretrained(tmp_path / "made" / "here")
    loaded = S2SentSelector.from_pretrained(tmp_path / "made" / "here", backend="reference")
    assert not loaded.training
    assert loaded.extra_repr().replace("'reference'", "'auto'") == selector.extra_repr()
    assert all(
        torch.equal(a, b) for a, b in zip(selector.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_folders_that_hold_no_selector(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match=r"expected a folder or one of the shipped names .*, got 'nowhere'"):
        S2SentSelector.from_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"config.json: cannot be read"):
        S2SentSelector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected the configuration of a selector"):
        S2SentSelector.from_pretrained(tmp_path)
    S2SentSelector(16, 3, 4, 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["selector"]["bottleneck"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"down.weight: expected shape \[5, 16\], got \[4, 16\]"):
        S2SentSelector.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        S2SentSelector.from_pretrained(tmp_path)


SHIPPED = {"all-MiniLM-L6-v2": (384, 6, 32, 4), "all-mpnet-base-v2": (768, 12, 64, 4)}


@pytest.mark.parametrize("name, sizes", SHIPPED.items(), ids=SHIPPED)
def test_the_shipped_selectors(name, sizes):
    pytest.importorskip("safetensors")
    assert pretrained.shipped() == sorted(SHIPPED)
    folder = pretrained.find(name)
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 1_500_000
    selector = S2SentSelector.from_pretrained(name)
    assert (selector.hidden_size, selector.num_blocks, selector.bottleneck, selector.frequencies) == sizes
    assert selector.block_prior is not None
    assert selector.norm is not None
    assert all(tensor.isfinite().all() for tensor in selector.state_dict().values())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "SNLI" in card
    assert "mean of last" in card
    about = pretrained.read_config(folder)
    assert about["blocks"] == list(range(sizes[1]))
    assert sum(about["scalar_mix"]) == pytest.approx(1)
