"""Checkpoints within an epoch: a training that goes on from one ends as if it had never been interrupted."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from builders import pairs, save_encoder, sentences
from two_processes import run_both

pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling  # noqa: E402
from s2sent_kernels.tools import callbacks, classifier, resuming, training  # noqa: E402
from s2sent_kernels.tools.examples import Examples, Scored  # noqa: E402
from s2sent_kernels.tools.problems import CLASSES, Problem  # noqa: E402

DEV = (["a cat", "a dog", "the moon"], ["the cat", "the moon", "a moon"], [1.0, 0.0, 0.7])
OFTEN, NEVER = 1e-9, 0.0  # minutes
RECIPE = training.Recipe(epochs=2, batch_size=4, learning_rate=1e-3, patience=2, save_minutes=OFTEN)


class Interrupted(Exception):
    pass


class Interrupt(transformers.TrainerCallback):
    """Ends a training after a step, before anything of that step is logged or saved; and knows at which steps there were
    checkpoints."""

    def __init__(self, step):
        self.step, self.saved = step, []

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step:
            raise Interrupted

    def on_save(self, args, state, control, **others):
        self.saved.append(state.global_step)


def sentence_model(encoder):
    transformer = Transformer(str(encoder))
    torch.manual_seed(0)
    pooling = S2SentPooling.behind(transformer, blocks=None, bottleneck=4, frequencies=4)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def contrastive(encoder, output, recipe, **options):
    examples = Examples(("anchor", "positive"), pairs(12), True)
    return training.fine_tune(sentence_model(encoder), examples, output, recipe, dev=DEV, **options)


def repeating(encoder, output, recipe, **options):
    """Of few texts: the sampler has to draw some of them again to fill its batches."""
    examples = Examples(("anchor", "positive"), [(text, text) for text in sentences(5) * 3], False)
    return training.fine_tune(sentence_model(encoder), examples, output, recipe, dev=DEV, **options)


def scored(encoder, output, recipe, **options):
    examples = Scored(pairs(12), [float(i % 5) for i in range(12)], "cosent")
    return training.fine_tune(sentence_model(encoder), examples, output, recipe, dev=DEV, **options)


def labels(encoder, output, recipe, **options):
    model = transformers.AutoModel.from_pretrained(encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    whole = classifier.make(
        model, classifier.Fusion(None, "mean", {"bottleneck": 4}), Problem(CLASSES, 2), ["no", "yes"]
    )
    parts = [
        classifier.Examples(texts, torch.tensor([int("moon" in text) for text in texts]))
        for texts in (sentences(12), sentences(9, 1))
    ]
    return classifier.fine_tune(whole, tokenizer, *parts, output, recipe, **options)


TRAININGS = [(contrastive, 1), (contrastive, 2), (repeating, 1), (scored, 1), (labels, 2)]  # with accumulation


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


def contents(folder):
    """Of a model; its card has a date."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def watched(monkeypatch, step=None):
    """Lets both trainers have an ``Interrupt``."""
    one, plain = Interrupt(step), callbacks.callbacks_of
    for module in (training, classifier):
        monkeypatch.setattr(module, "callbacks_of", lambda recipe: [*plain(recipe), one])
    return one


@pytest.mark.parametrize("train, accumulation", TRAININGS, ids=lambda one: getattr(one, "__name__", one))
def test_a_training_goes_on_within_an_epoch(tmp_path, encoder, monkeypatch, capsys, train, accumulation):
    recipe = RECIPE._replace(accumulation=accumulation, batch_size=RECIPE.batch_size // accumulation)
    with monkeypatch.context() as patch:
        seen = watched(patch)
        score = train(encoder, tmp_path / "whole", recipe._replace(save_minutes=NEVER))
    want = contents(tmp_path / "whole")
    each = seen.saved[0]  # steps of an epoch
    assert seen.saved == [each, 2 * each] and each > 2
    for stopped in (2, each, each + 2):
        output = tmp_path / str(stopped)
        with monkeypatch.context() as patch:
            seen = watched(patch, stopped)
            with pytest.raises(Interrupted):
                train(encoder, output, recipe)
        assert seen.saved == list(range(1, stopped))
        capsys.readouterr()
        assert train(encoder, output, recipe, resume=True) == score
        said = f"training goes on from {output}/{resuming.CHECKPOINTS}/checkpoint-{stopped - 1}\n"
        assert capsys.readouterr().out.startswith(said)
        assert contents(output) == want, stopped


def test_a_checkpoint_within_an_epoch_comes_after_so_many_minutes(tmp_path, encoder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks, "clock", lambda: now[0])

    class Minute(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            now[0] += 60.0

    plain = callbacks.callbacks_of
    monkeypatch.setattr(callbacks, "callbacks_of", lambda recipe: [Minute(), *plain(recipe)])
    # An epoch has six steps and ends with a checkpoint, from which the minutes count.
    for minutes, want in ((4.0, [4, 6, 10, 12]), (2.5, [3, 6, 9, 12]), (5.5, [6, 12]), (0.0, [6, 12])):
        with monkeypatch.context() as patch:
            seen = watched(patch)
            contrastive(encoder, tmp_path / str(minutes), RECIPE._replace(batch_size=2, save_minutes=minutes))
        assert seen.saved == want, minutes


@pytest.mark.parametrize("train", [contrastive, labels], ids=lambda train: train.__name__)
@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_minutes_that_are_none(tmp_path, encoder, train, minutes):
    with pytest.raises(ValueError, match="save_minutes: expected"):
        train(encoder, tmp_path / "out", RECIPE._replace(save_minutes=minutes))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- two processes


def in_a_process(folder, runs):
    """One of two, whose clocks differ: the second's would never make a checkpoint. Of a run: its name, the step at which it is
    interrupted or 0, and whether it goes on."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    recipe = RECIPE._replace(batch_size=2, save_minutes=1e9 if rank else OFTEN)
    plain = callbacks.callbacks_of
    for name, step, resume in runs:
        one = Interrupt(step or None)
        for module in (training, classifier):
            module.callbacks_of = lambda recipe, one=one: [*plain(recipe), one]
        for train in (contrastive, labels):
            with contextlib.suppress(Interrupted):
                train(Path(folder) / "encoder", Path(folder) / f"{name}-{train.__name__}", recipe, resume=resume)
            print(name, train.__name__, "saved", *one.saved)
            one.saved.clear()


def two_processes(folder, *runs):
    told = run_both(__file__, f"in_a_process({str(folder)!r}, {runs})")
    return [[line for line in text.splitlines() if " saved" in line] for text in told]


def test_two_processes_save_together_and_go_on(tmp_path):
    save_encoder(tmp_path / "encoder")
    # The second run ends in its second epoch, whose order is another.
    both = two_processes(tmp_path, ("whole", 0, False), ("parts", 5, False))
    expected = {"whole": "1 2 3 4 5 6", "parts": "1 2 3 4"}
    lines = [f"{name} {task} saved {steps}" for name, steps in expected.items() for task in ("contrastive", "labels")]
    assert both[0] == both[1] == lines
    two_processes(tmp_path, ("parts", 0, True))
    for train in (contrastive, labels):
        whole, parts = (contents(tmp_path / f"{name}-{train.__name__}") for name in ("whole", "parts"))
        assert whole and parts == whole, train.__name__
