"""Fine-tuning of encoder and selector: it learns, resumes, keeps the best, and what it refuses."""

import itertools

import pytest
import torch
from builders import pairs, save_encoder, sentences

from s2sent_kernels.tools.examples import Examples, Scored

pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402
from s2sent_kernels.tools import resuming, training  # noqa: E402


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of 2 blocks with a tokenizer of a few words, in a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


def make_model(encoder, **options):
    transformer = Transformer(str(encoder))
    torch.manual_seed(0)
    pooling = S2SentPooling.behind(transformer, blocks=None, bottleneck=4, frequencies=4, block_prior=True, **options)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def test_it_learns_and_what_is_saved_is_what_was_trained(tmp_path, encoder):
    model = make_model(encoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = Examples(("anchor", "positive"), pairs(64), True)
    recipe = training.Recipe(epochs=15, batch_size=16, learning_rate=3e-3)
    assert training.fine_tune(model, examples, tmp_path / "out", recipe) is None
    after = model.state_dict()
    assert not (tmp_path / "out" / resuming.CHECKPOINTS).exists()
    for part in ("0.", "1.selector."):
        assert any(name.startswith(part) and not torch.equal(before[name], after[name]) for name in after), part
    texts, partners = (list(side) for side in zip(*pairs(64), strict=True))

    def accuracy(some):
        similarity = some.similarity(some.encode(texts), some.encode(partners))
        return (similarity.argmax(1) == torch.arange(64)).float().mean().item()

    assert accuracy(model) > accuracy(make_model(encoder)) + 0.3
    loaded = load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, encoder, monkeypatch):
    examples = Examples(
        ("anchor", "positive", "negative"),
        [(*pair, other) for pair, other in zip(pairs(24), sentences(24, 1), strict=True)],
        True,
    )
    recipe = training.Recipe(epochs=3, batch_size=8, learning_rate=1e-3)
    whole = make_model(encoder)
    training.fine_tune(whole, examples, tmp_path / "whole", recipe)

    class Stop(Exception):
        pass

    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch > 1.5:
                raise Stop

    model, plain = make_model(encoder), training._Trainer
    monkeypatch.setattr(
        training, "_Trainer", lambda callbacks, **options: plain(callbacks=[*callbacks, Interrupt()], **options)
    )
    with pytest.raises(Stop):
        training.fine_tune(model, examples, tmp_path / "parts", recipe)
    monkeypatch.setattr(training, "_Trainer", plain)
    resumed = make_model(encoder)
    training.fine_tune(resumed, examples, tmp_path / "parts", recipe, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoints_are_of_one_training(tmp_path, encoder, monkeypatch):
    """Another training does not resume from them, and none starts while one runs in the same folder."""
    examples, recipe = Examples(("anchor", "positive"), pairs(16), True), training.Recipe(epochs=2, batch_size=8)
    caught = []

    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="another process is writing there") as error:
                training.fine_tune(make_model(encoder), examples, tmp_path, recipe, resume=bool(state.global_step))
            caught.append(error)
            if state.global_step:
                raise KeyboardInterrupt

    plain = training._Trainer
    monkeypatch.setattr(
        training, "_Trainer", lambda callbacks, **options: plain(callbacks=[*callbacks, Interrupt()], **options)
    )
    with pytest.raises(KeyboardInterrupt):
        training.fine_tune(make_model(encoder), examples, tmp_path, recipe)
    assert len(caught) == 2
    monkeypatch.setattr(training, "_Trainer", plain)
    wider = Transformer(str(encoder))
    wider = SentenceTransformer(modules=[wider, S2SentPooling.behind(wider, blocks=None, bottleneck=5)], device="cpu")
    for model, some, other, word in (
        (make_model(encoder), examples, recipe._replace(epochs=3), "epochs = 2, got 3"),
        (make_model(encoder), examples._replace(rows=examples.rows[1:]), recipe, "other examples (data)"),
        (
            wider,
            examples,
            recipe,
            "bottleneck = 4, got 5; frequencies = 4, got nothing; block_prior = True, got nothing; other sizes",
        ),
    ):
        with pytest.raises(ValueError) as error:
            training.fine_tune(model, some, tmp_path, other, resume=True)
        said = str(error.value)
        assert said.startswith(f"resume: expected the settings that {tmp_path / 'checkpoints'} was begun with: {word}")
        assert said.endswith(": repeat those to go on, or name another output folder to begin a training of its own")
    training.fine_tune(make_model(encoder), examples, tmp_path, recipe, resume=True)
    assert not (tmp_path / resuming.CHECKPOINTS).exists() and load(tmp_path, device="cpu")


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path, encoder, monkeypatch):
    scores = iter([0.3, 0.7, 0.5, 0.4, 0.9])
    seen = []

    class Evaluator(training.EmbeddingSimilarityEvaluator):
        def __call__(self, model, *args, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"dev_spearman_cosine": next(scores)}

    monkeypatch.setattr(training, "EmbeddingSimilarityEvaluator", Evaluator)
    model = make_model(encoder)
    recipe = training.Recipe(epochs=5, batch_size=16, learning_rate=1e-3, patience=2)
    dev = (["a cat", "a dog"], ["the cat", "the moon"], [1.0, 0.0])
    score = training.fine_tune(
        model, Examples(("anchor", "positive"), pairs(32), True), tmp_path / "out", recipe, dev=dev
    )
    assert score == pytest.approx(70) and len(seen) == 4
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())


def test_every_hard_negative_counts(tmp_path, encoder):
    columns = ("anchor", "positive", "negative_1", "negative_2")
    rows = [(*pair, one, two) for pair, one, two in zip(pairs(8), sentences(8, 1), sentences(8, 2), strict=True)]
    found = []
    for width in (2, 3, 4):
        model = make_model(encoder)
        examples = Examples(columns[:width], [row[:width] for row in rows], True)
        training.fine_tune(model, examples, tmp_path / str(width), training.Recipe(epochs=2, batch_size=8))
        found.append(model[1].selector.up.weight.detach().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_the_selector_has_its_own_learning_rate(tmp_path, encoder):
    model = make_model(encoder, gate_scale=4.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = {"learning_rate": 0.0, "selector_learning_rate": 1e-12, "prior_learning_rate": 1e-2}
    recipe = training.Recipe(epochs=1, batch_size=8, **rates)
    training.fine_tune(model, Examples(("anchor", "positive"), pairs(16), True), tmp_path, recipe)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "1.selector.block_prior" in changed and all(name.startswith("1.selector.") for name in changed)
    for prior in ("1.selector.block_prior", "1.selector.gate_scale"):
        assert (model.state_dict()[prior] - before[prior]).abs().max() > 1e-4
    down = "1.selector.down.weight"
    assert (model.state_dict()[down] - before[down]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": [("a", "b", "c")]}, "expected two or more"),
        (
            {"rows": [("a", "b", "c"), ("d", "e", "c")]},
            "expected 2 at once without a text that repeats, got 2 of which",
        ),
        ({"rows": [("a", "b", "c"), ("d", "e", "")]}, "expected every row to have all negatives"),
        ({"recipe": training.Recipe(patience=2)}, "patience: expected dev"),
        ({"recipe": training.Recipe(precision="int4")}, "precision: expected one of"),
        ({"recipe": training.Recipe(epochs=0)}, "epochs: expected a positive"),
        ({"recipe": training.Recipe(mini_batch=0)}, "mini_batch: expected a positive"),
        ({"recipe": training.Recipe(mini_batch=2)}, "mini_batch: expected None beside the gate's batch norm, got 2"),
        ({"dev": (["a", "b"], ["c", "d"], [1.0, 1.0])}, "dev: expected pairs with different scores"),
        ({"recipe": training.Recipe(temperature=float("nan"))}, "temperature: expected a positive number"),
        ({"recipe": training.Recipe(learning_rate=float("inf"))}, "learning_rate: expected a finite number, 0 or more"),
        ({"recipe": training.Recipe(learning_rate=1e38)}, "training diverged, .* is not finite any more"),
    ],
)
def test_what_it_refuses(tmp_path, encoder, change, message):
    rows = change.pop("rows", [("a", "b", "c"), ("d", "e", "f")])
    examples = Examples(("anchor", "positive", "negative"), rows, True)
    with pytest.raises(ValueError, match=message):
        training.fine_tune(make_model(encoder), examples, tmp_path / "deep" / "out", **change)
    left = {path.name for path in (tmp_path / "deep" / "out").glob("*")}
    assert left == {resuming.CHECKPOINTS} if "diverged" in message else not (tmp_path / "deep").exists()


@pytest.mark.parametrize("mini_batch", [3, 8])
def test_mini_batches_train_what_the_batch_trains(tmp_path, encoder, mini_batch):
    """The same negatives and gradients; in float64, without dropout, so that nothing but rounding differs."""
    columns = ("anchor", "positive", "negative")
    rows = [(*pair, other) for pair, other in zip(pairs(16), sentences(16, 1), strict=True)]
    found = []
    for name, size in (("whole", None), ("parts", mini_batch)):
        model = make_model(encoder, gate_norm=None).double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        recipe = training.Recipe(epochs=2, batch_size=8, learning_rate=1e-3, mini_batch=size)
        training.fine_tune(model, Examples(columns, rows, True), tmp_path / name, recipe)
        found.append(model.state_dict())
    changed = make_model(encoder, gate_norm=None).double().state_dict()
    assert any(not torch.equal(found[0][name], changed[name]) for name in changed)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_checkpoints_that_name_no_mini_batch_have_none(tmp_path):
    """Those of earlier releases."""
    folder = tmp_path / resuming.CHECKPOINTS
    folder.mkdir()
    folder.joinpath(resuming._SETTINGS).write_text('{"epochs": 2}')
    known = {"epochs": 2, "processes": 1, "mini_batch": None}
    resuming.check_settings(tmp_path, known)
    for name, before, value in (("mini_batch", None, 4), ("processes", 1, 2), ("new", "nothing", 3)):
        with pytest.raises(ValueError, match=f"begun with: {name} = {before}, got {value}: repeat those"):
            resuming.check_settings(tmp_path, known | {name: value})


def test_mini_batches_are_of_negatives(tmp_path, encoder):
    scored = Scored([("a", "b"), ("c", "d")], [0.0, 1.0], "cosent")
    with pytest.raises(ValueError, match="mini_batch: expected None with scored pairs"):
        training.fine_tune(make_model(encoder, gate_norm=None), scored, tmp_path, training.Recipe(mini_batch=2))


def test_sentences_alone_need_dropout(tmp_path, encoder):
    model = make_model(encoder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    examples = Examples(("anchor", "positive"), [(text, text) for text in sentences(8)], False)
    with pytest.raises(ValueError, match="since the encoder's dropout is 0"):
        training.fine_tune(model, examples, tmp_path / "out")


def test_sentences_that_repeat_are_not_their_own_negatives(tmp_path, encoder):
    """Two texts, many times: only batches of two are without a repetition."""
    examples = Examples(("anchor", "positive"), [(text, text) for text in sentences(2) * 4], False)
    training.fine_tune(make_model(encoder), examples, tmp_path / "two", training.Recipe(epochs=1, batch_size=2))
    with pytest.raises(ValueError, match="expected 4 at once without a text that repeats"):
        training.fine_tune(make_model(encoder), examples, tmp_path / "four", training.Recipe(epochs=1, batch_size=4))
