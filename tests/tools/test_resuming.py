"""Trainings that are killed, and go on: from the newest whole checkpoint, to the same bytes, over no finished model."""

import json
import os
import shutil

import killing
import pytest
import torch
from builders import pairs, save_encoder, sentences

pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling  # noqa: E402
from s2sent_kernels.tools import classifier, history, resuming, training  # noqa: E402
from s2sent_kernels.tools.examples import Examples  # noqa: E402
from s2sent_kernels.tools.problems import CLASSES, Problem  # noqa: E402

DEV = (["a cat", "a dog", "the moon"], ["the cat", "the moon", "a moon"], [1.0, 0.0, 0.7])
RECIPE = training.Recipe(epochs=2, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


class Sentences:
    """A SentenceTransformer, contrastively."""

    last = training.LAST

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, output, recipe=RECIPE, **options):
        transformer = Transformer(str(self.encoder))
        torch.manual_seed(0)
        pooling = S2SentPooling.behind(transformer, blocks=None, bottleneck=4, frequencies=4)
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        examples = Examples(("anchor", "positive"), pairs(16), True)
        options = {"dev": DEV, **options}
        return training.fine_tune(model, examples, output, recipe, **options)


class Labels:
    """A classifier."""

    last = classifier.LAST

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, output, recipe=RECIPE, **options):
        model = transformers.AutoModel.from_pretrained(self.encoder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.encoder)
        torch.manual_seed(0)
        fusion = classifier.Fusion(None, "mean", {"bottleneck": 4})
        whole = classifier.make(model, fusion, Problem(CLASSES, 2), ["no", "yes"])
        parts = [
            classifier.Examples(texts, torch.tensor([int("moon" in text) for text in texts]))
            for texts in (sentences(16), sentences(9, 1))
        ]
        return classifier.fine_tune(whole, tokenizer, *parts, output, recipe, **options)


@pytest.fixture(params=[Sentences, Labels], ids=["sentences", "labels"])
def train(request, encoder):
    return request.param(encoder)


def contents(folder):
    """Of a model; its card has a date."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stopped_before_the_end(train, output, monkeypatch, **options):
    """A training with all of its checkpoints, whose model is not saved yet."""

    class Stop(Exception):
        pass

    def unsaved(_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "unsaved", unsaved)
        with pytest.raises(Stop):
            train(output, **options)


def test_killed_at_file_operations(tmp_path, train):
    """With checkpoints within the epochs, too."""
    place, output = tmp_path / "place", tmp_path / "place" / "out"
    recipe = RECIPE._replace(save_minutes=1e-9)
    place.mkdir()
    count = killing.operations(place, lambda: train(output, recipe))
    want = contents(output)
    assert train.last in want and not (output / resuming.CHECKPOINTS).exists()
    for step in killing.points(count, killing.POINTS if train.last == training.LAST else killing.POINTS // 2):
        shutil.rmtree(output)
        assert killing.killed_at(step, place, lambda: train(output, recipe))
        if resuming.finished(output, train.last):
            with pytest.raises(ValueError, match="holds a finished model already"):
                train(output, recipe, resume=True)
            assert resuming.remove_leftovers(output, train.last)
        else:
            train(output, recipe, resume=True)
        assert contents(output) == want, step
        assert os.listdir(place) == ["out"], step


def test_killed_while_the_checkpoints_are_removed(tmp_path, train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "remove", lambda _: None)
        train(tmp_path / "start")
    place = tmp_path / "place"
    shutil.copytree(tmp_path / "start", place)
    count = killing.operations(place, lambda: resuming.remove(place))
    want = contents(place)
    assert count > 15 and train.last in want
    for step in range(1, count + 1):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "start", place)
        assert killing.killed_at(step, place, lambda: resuming.remove(place))
        with pytest.raises(ValueError, match="holds a finished model already"):
            train(place, resume=True)
        assert resuming.remove_leftovers(place, train.last)
        assert contents(place) == want, step
        assert not (place / resuming.CHECKPOINTS).exists(), step


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


HARMS = {
    "optimizer.pt": os.unlink,
    "rng_state.pth": os.unlink,
    "scheduler.pt": cut,
    "trainer_state.json": cut,
    "model.safetensors": cut,
}


@pytest.mark.parametrize("name", HARMS)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, train, monkeypatch, capsys, name):
    stopped_before_the_end(train, tmp_path / "out", monkeypatch)
    checkpoints = tmp_path / "out" / resuming.CHECKPOINTS
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(found) == 2
    whole = found[0]
    # The best one counts, too: without it the trainer would keep the last weights.
    for path in found:
        state = json.loads((path / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = f"elsewhere/{whole.name}"
        (path / "trainer_state.json").write_text(json.dumps(state))
    HARMS[name](next(found[1].rglob(name)))
    capsys.readouterr()
    train(tmp_path / "out", resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line or "goes on" in line]
    assert len(said) == 2 and said[0].startswith(f"{found[1]}: is not whole, ") and name in said[0]
    assert said[1] == f"training goes on from {whole}"
    assert not checkpoints.exists() and resuming.finished(tmp_path / "out", train.last)


def test_without_its_best_a_checkpoint_is_not_whole(tmp_path, train, monkeypatch, capsys):
    stopped_before_the_end(train, tmp_path / "out", monkeypatch)
    checkpoints = tmp_path / "out" / resuming.CHECKPOINTS
    for path in checkpoints.glob("checkpoint-*"):
        state = json.loads((path / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = "checkpoint-77"
        (path / "trainer_state.json").write_text(json.dumps(state))
    capsys.readouterr()
    train(tmp_path / "out", resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line or "goes on" in line]
    assert all("checkpoint-77 has no weights" in line for line in said[:2])
    assert said[2] == "training goes on from the beginning"
    train(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def card(folder):
    """The README of a model without the times that it took."""
    lines = (folder / "README.md").read_text().splitlines()
    return [line for line in lines if not line.startswith(("- **Training**", "- **Evaluation**", "- **Total**"))]


@pytest.mark.parametrize("dev", [DEV, None], ids=["dev", "no dev"])
@pytest.mark.parametrize("step", [2, 3, 4, None])
def test_the_card_of_a_resumed_training_has_all_of_it(tmp_path, encoder, monkeypatch, step, dev):
    """Stopped within an epoch, behind its end, and with nothing left to train."""
    train, recipe = Sentences(encoder), RECIPE._replace(save_minutes=1e-9)
    train(tmp_path / "whole", recipe, dev=dev)

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == step:
                raise KeyboardInterrupt

    plain = training.callbacks_of
    if step is None:
        stopped_before_the_end(train, tmp_path / "out", monkeypatch, recipe=recipe, dev=dev)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "callbacks_of", lambda recipe: [*plain(recipe), Interrupt()])
            train(tmp_path / "out", recipe, dev=dev)
    train(tmp_path / "out", recipe, dev=dev, resume=True)
    want = card(tmp_path / "whole")
    assert card(tmp_path / "out") == want
    assert sum(line.startswith(("| 0.5 ", "| 1.0 ", "| **1.0** ", "| 2.0 ", "| **2.0** ")) for line in want) == 3


def test_patience_that_is_used_up_stays_so(tmp_path, encoder, monkeypatch):
    scores, calls = [0.7, 0.5, 0.4, 0.9], []

    class Evaluator(training.EmbeddingSimilarityEvaluator):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            calls.append(scores[len(calls)])
            metrics, self.primary_metric = {"dev_spearman_cosine": calls[-1]}, "dev_spearman_cosine"
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
            return metrics

    monkeypatch.setattr(training, "EmbeddingSimilarityEvaluator", Evaluator)
    train, recipe = Sentences(encoder), RECIPE._replace(epochs=4, patience=2)
    stopped_before_the_end(train, tmp_path / "out", monkeypatch, recipe=recipe)
    assert len(calls) == 3
    os.replace(tmp_path / "out", tmp_path / "moved")  # the trainer's note of the best one leads nowhere now
    assert train(tmp_path / "moved", recipe, resume=True) == pytest.approx(70) and len(calls) == 3
    calls.clear()
    assert train(tmp_path / "whole", recipe) == pytest.approx(70)
    assert contents(tmp_path / "moved") == contents(tmp_path / "whole")
    assert card(tmp_path / "moved") == card(tmp_path / "whole")


@pytest.mark.parametrize("task", ["contrastive", "classification"])
def test_the_command_goes_on(tmp_path, encoder, capsys, task, monkeypatch):
    """One command, whatever there is: nothing, a checkpoint, a finished model with or without a rest of them. Files of others
    and another training are refused."""
    if task == "classification":
        rows = ["label\ttext", *(f"{int('moon' in text)}\t{text}" for text in sentences(24))]
    else:
        rows = ["anchor\tpositive", *("\t".join(pair) for pair in pairs(24))]
    (tmp_path / "data.tsv").write_text("\n".join(rows) + "\n")
    output = tmp_path / "out"
    arguments = ["train", "--task", task, "--data", tmp_path / "data.tsv", "--model", encoder, "--output", output]
    arguments += ["--epochs", 2, "--batch-size", 8, "--device", "cpu", "--frequencies", 4]

    def run(*options):
        return main([*map(str, arguments), *options])

    with monkeypatch.context() as patch:

        def unsaved(_):
            raise KeyboardInterrupt

        patch.setattr(resuming, "unsaved", unsaved)
        assert run("--resume") == 130
        assert "training goes on from the beginning" in capsys.readouterr().out
    assert run() == 2
    assert "not empty; --resume goes on from a checkpoint in it" in capsys.readouterr().err
    assert run("--resume", "--seed", "7") == 2
    assert "seed = 0, got 7: repeat those to go on, or name another output" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "remove", lambda _: None)
        assert run("--resume") == 0
    assert f"training goes on from {output}/checkpoints/checkpoint-" in capsys.readouterr().out
    before = contents(output)
    assert run("--resume", "--task", "contrastive" if task == "classification" else "classification") == 2
    assert contents(output) == before and capsys.readouterr().out == ""  # it is no other task's because it is finished
    (output / resuming.CHECKPOINTS / "settings.json").unlink()
    os.truncate(next(output.rglob("trainer_state.json")), 9)
    for _ in range(2):
        assert run("--resume") == 0
        assert capsys.readouterr().out == f"{output}: the model is finished\n"
    assert (
        run() == 2
        and "it is there already and not empty; name another, or remove what is in it" in capsys.readouterr().err
    )
    assert contents(output) == {name: data for name, data in before.items() if not name.startswith("checkpoints/")}
    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for _ in range(2):  # also beside somebody's empty folder of that name
        assert run("--resume") == 2 and "it is there already and not empty" in capsys.readouterr().err
        assert os.listdir(output)[0] in ("notes.txt", resuming.CHECKPOINTS)
        (output / resuming.CHECKPOINTS).mkdir(exist_ok=True)
    assert sorted(os.listdir(output)) == [resuming.CHECKPOINTS, "notes.txt"]


# ---------------------------------------------------------------- epochs of repeated texts


class Repeats(Sentences):
    """Few texts, of which no batch takes one twice: a pass over the data has fewer batches than its rows would fill."""

    rows = tuple((f"a {word}", f"the {word}") for word in ("cat", "dog", "moon") for _ in range(3)) + tuple(pairs(9))

    def __call__(self, output, recipe=RECIPE, **options):
        transformer = Transformer(str(self.encoder))
        torch.manual_seed(0)
        pooling = S2SentPooling.behind(transformer, blocks=None, bottleneck=4, frequencies=4)
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        examples = Examples(("anchor", "positive"), list(self.rows), True)
        return training.fine_tune(model, examples, output, recipe, **{"dev": DEV, **options})


REPEATING = RECIPE._replace(epochs=3, batch_size=6, save_minutes=1e-9)


@pytest.fixture
def one_pass(monkeypatch):
    """As earlier releases of sentence-transformers draw an epoch, and later ones where a few passes do not fill it."""
    monkeypatch.setattr("sentence_transformers.base.sampler._MAX_RESAMPLE_PASSES", 0, raising=False)


@pytest.mark.parametrize("step", [3, 5, 6, 8])
def test_repeated_texts_shorten_no_epoch(tmp_path, encoder, one_pass, monkeypatch, step):
    """A training that goes on counts epochs by their full number of batches."""
    train = Repeats(encoder)
    train(tmp_path / "want", REPEATING)
    want = contents(tmp_path / "want")
    lines = history.read(tmp_path / "want")
    assert [line.step for line in lines if line.dev is not None] == [3, 6, 9]  # of 18 rows in batches of 6

    class Killed(Exception):
        pass

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == step:
                raise Killed

    with monkeypatch.context() as patch:
        plain = training.callbacks_of
        patch.setattr(training, "callbacks_of", lambda recipe: [*plain(recipe), Kill()])
        with pytest.raises(Killed):
            train(tmp_path / "out", REPEATING)
    train(tmp_path / "out", REPEATING, resume=True)
    assert contents(tmp_path / "out") == want


def test_each_epoch_has_its_order_and_no_batch_a_text_twice(encoder, one_pass):
    dataset = training.Dataset.from_dict(training._columns(Examples(("anchor", "positive"), list(Repeats.rows), True)))
    sampler = training.FullEpochs(dataset, 6, True, generator=torch.Generator(), seed=0)
    found = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler) == 3
        for batch in found[-1]:
            texts = [text for row in batch for text in Repeats.rows[row]]
            assert len(texts) == len(set(texts)) == 12
    assert any(len(set(map(tuple, batches))) < 3 for batches in found)  # some were short
    assert len({tuple(map(tuple, batches)) for batches in found}) == 4
