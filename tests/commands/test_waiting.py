"""What a command says while it is silent, and how far a training with the encoder is. No clock runs here."""

import gc
import io
import re
import sys
import threading
import types

import pytest
import torch
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels import waiting
from s2sent_kernels.cli import main
from s2sent_kernels.commands.train_task import Epochs, Pace
from s2sent_kernels.frozen import Recipe
from s2sent_kernels.frozen_loop import Epoch

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from s2sent_kernels.tools import progress


def lines_of(wait):
    """The one that looks at the clock for a ``told``."""
    return wait.gen.gi_frame.f_locals["lines"]


def test_a_silence_is_told_once_it_is_long(now, capsys):
    """And for how long it has lasted, as long as it does."""
    wait = waiting.told("loading the encoder")
    with wait:
        lines = lines_of(wait)
        for now[0], wanted in (
            (2.9, ""),
            (3.0, "loading the encoder ...\n"),
            (7.9, ""),
            (8.0, "loading the encoder ... 8 s\n"),
            (13.2, "loading the encoder ... 13 s\n"),
        ):
            lines.look()
            assert capsys.readouterr().err == wanted
    now[0] = 100.0
    lines.look()
    with pytest.raises(RuntimeError), waiting.told("more"):
        raise RuntimeError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("since, left", [(0.0, 3.0), (1.5, 1.5), (2.5, 1.0), (60.0, 1.0)])
def test_several_short_silences_are_a_long_one(now, capsys, since, left):
    """And what takes less than a second is never told."""
    now[0] = since
    for wanted in (left, 3.0):
        begun, wait = now[0], waiting.told("loading the encoder")
        with wait:
            for now[0], said in ((begun + wanted - 0.1, ""), (begun + wanted, "loading the encoder ...\n")):
                lines_of(wait).look()
                assert capsys.readouterr().err == said


def test_nothing_is_said_unasked_or_to_nobody(all_too_long, monkeypatch, capsys):
    with waiting.told("x"):
        assert capsys.readouterr().err == "x ...\n"
    with waiting.told("x", False):
        pass
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        with waiting.told("x"):
            pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)
    with waiting.told("x"):
        pass


def test_a_line_is_not_written_into_a_bar(now, monkeypatch):
    """The bar is cleared before, and drawn again below."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.Progress(30, bar=True) as shown:
        shown.advance(10, None)
        before = len(sys.stderr.getvalue())
        waiting.say("loading the encoder ...")
        said = sys.stderr.getvalue()[before:]
    assert re.match(r"\r *\rloading the encoder \.\.\.\n\r10 of 30 texts ", said)


def test_a_bar_moves_while_a_step_lasts(monkeypatch):
    """The time it took is drawn again and again, until it is closed; a thread does not keep it alive."""
    monkeypatch.setattr(waiting, "LOOK", 1e-3)
    drawn = threading.Event()
    bar = progress.drawn(30, 0, "steps")
    monkeypatch.setattr(bar, "refresh", lambda *_, **__: drawn.set())
    assert drawn.wait(60)
    threads = [thread for thread in threading.enumerate() if thread.name.endswith("(_draw_until)")]
    monkeypatch.undo()
    bar.close()
    lost = progress.drawn(30, 0, "steps")
    threads += [thread for thread in threading.enumerate() if thread.name.endswith("(_draw_until)")]
    del lost
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_commands_say_what_they_load(all_too_long, tmp_path, capsys):
    """One place: the loaders of commands/common.py; and what a cache does before its first batch."""
    save_encoder(tmp_path / "encoder")
    data = write_examples(tmp_path / "data.tsv", pairs(8))
    command = ["train", "--data", data, "--model", tmp_path / "encoder", "--device", "cpu", "--epochs", 1]
    frozen = ["--freeze-encoder", "--cache", tmp_path / "cache", "--output", tmp_path / "selector"]
    assert main([str(argument) for argument in [*command, *frozen]]) == 0
    said = capsys.readouterr().err
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert [line for line in said.splitlines() if line.endswith(" ...") and " texts " not in line] == [
        f"loading {tmp_path / 'encoder'} ...",
        "computing the digest of the encoder's weights ...",
        f"waiting for another process that fills {cache} ...",
        "computing the checksums of the cache ...",
        "reading the cache ...",
    ]
    pytest.importorskip("datasets")
    assert main([str(argument) for argument in [*command, "--output", tmp_path / "model"]]) == 0
    said = capsys.readouterr().err
    assert f"loading {tmp_path / 'encoder'} ...\n" in said and "importing sentence-transformers ...\n" in said
    (tmp_path / "texts.txt").write_text("a cat\na dog\n")
    command = ["encode", tmp_path / "texts.txt", "--model", tmp_path / "model", "--output", tmp_path / "out.npy"]
    assert main([str(argument) for argument in [*command, "--device", "cpu"]]) == 0
    assert f"loading {tmp_path / 'model'} ...\n" in capsys.readouterr().err


# ---------------------------------------------------------------- a training with the encoder


def state(step, steps=100, epoch=0.0):
    return types.SimpleNamespace(global_step=step, max_steps=steps, epoch=epoch, is_world_process_zero=True)


@pytest.fixture
def callbacks():
    pytest.importorskip("datasets")
    from s2sent_kernels.tools import callbacks

    return callbacks


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets, and at which nobody looks unasked."""
    time = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: time[0])
    monkeypatch.setattr(waiting, "LOOK", 1e6)
    monkeypatch.setattr(waiting, "SILENCE", 3.0)
    monkeypatch.setattr(waiting, "_last", 0.0)
    return time


def steps_at(display, known, now, *places):
    for known.global_step, now[0] in places:
        display.on_step_end(None, known, None)


def test_lines_where_nobody_watches(callbacks, now, capsys):
    known = state(20)  # it goes on from a checkpoint
    with callbacks.Lines("eval_score", 100) as lines:
        lines.on_train_begin(None, known, None)
        steps_at(lines, known, now, (25, 2.5), (30, 5.0), (32, 9.0), (40, 20.0))
        assert capsys.readouterr() == ("", "step 30 of 100, 00:35 left\nstep 40 of 100, 01:00 left\n")
        known.global_step, known.epoch, now[0] = 50, 1.0, 29.0
        lines.on_log(None, known, None, {"loss": 0.5, "grad_norm": 1.0})
        lines.on_log(None, known, None, {"eval_score": 0.75})
        lines.on_log(None, known, None, {"train_runtime": 9.0})
        steps_at(lines, known, now, (55, 33.0))  # something was said 4 seconds ago
        wanted = "epoch 1.00, step 50 of 100: loss 0.5000\nepoch 1.00, step 50 of 100: dev 75.00\n"
        assert capsys.readouterr() == (wanted, "")


def test_the_time_left_is_said_soon(callbacks, now, capsys):
    known = state(0)
    with callbacks.Lines("eval_score", 100) as lines:
        lines.on_train_begin(None, known, None)
        steps_at(lines, known, now, (1, 2.0), (2, 4.0), (3, 6.0), (10, 8.0), (17, 34.0))
        assert capsys.readouterr().err == "step 2 of 100, 03:16 left\nstep 17 of 100, 02:46 left\n"


def test_other_processes_and_others_scorings_are_silent(callbacks, now, capsys, monkeypatch):
    known = state(0)
    known.is_world_process_zero = False
    with callbacks.Lines("eval_score", 100) as lines:
        lines.on_train_begin(None, known, None)
        steps_at(lines, known, now, (1, 100.0))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(callbacks, "Progress", None)
    with callbacks.Lines("eval_score", 100, callbacks.Dev(8, None, len)) as lines, lines.scoring():
        pass
    assert capsys.readouterr() == ("", "")


def test_the_time_of_a_scoring_is_told_by_it(callbacks, now, capsys, monkeypatch):
    """By the rows of each batch, and no line about steps beside them."""
    monkeypatch.setattr(callbacks, "PROGRESS_EVERY", 0.0)
    monkeypatch.setattr(progress, "PROGRESS_EVERY", 0.0)
    module, known = torch.nn.Identity(), state(5)
    with callbacks.Lines("eval_score", 100, callbacks.Dev(8, module, len)) as lines:
        lines.on_train_begin(None, known, None)
        with lines.scoring():
            for rows in (3, 3, 3):  # a batch may have been filled up
                module(torch.zeros(rows, 1))
                lines.on_step_end(None, known, None)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [f"dev: {count} of 8 texts" for count in (3, 6, 8)]
    assert not module._forward_hooks


def test_a_step_that_lasts_is_told_while_it_does(callbacks, capsys, monkeypatch):
    """By a thread: each step of this training ends once a line was said in it."""
    monkeypatch.setattr(waiting, "LOOK", 1e-3)
    monkeypatch.setattr(callbacks, "PROGRESS_EVERY", 0.0)
    said, spoke, known = [], threading.Event(), state(0, 2)

    def say(line):
        said.append(line)
        spoke.set()

    monkeypatch.setattr(waiting, "say", say)
    with callbacks.Lines("eval_score") as lines:
        lines.on_train_begin(None, known, None)
        assert spoke.wait(60) and said[0] == "step 0 of 2 ..."
        known.global_step = 1
        lines.on_step_end(None, known, None)
        count = len(said)
        spoke.clear()
        assert spoke.wait(60) and said[count].startswith("step 1 of 2, ")
    count = len(said)
    assert not any(thread.name == lines._lines._thread.name for thread in threading.enumerate()) and len(said) == count


@pytest.mark.parametrize("task", ["contrastive", "sts", "classification"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_training_tells_how_far_its_scoring_is(callbacks, task, watched, tmp_path, monkeypatch, capsys):
    """Each epoch, to the last text of the dev part, on a terminal as elsewhere."""
    if watched:
        monkeypatch.setattr(callbacks, "on_terminal", lambda: True)
        monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(progress, "PROGRESS_EVERY", 0.0)
    monkeypatch.setattr(waiting, "LOOK", 1e6)
    save_encoder(tmp_path / "encoder")
    rows = [(str(i % 5), one, other) for i, (one, other) in enumerate(pairs(24))]
    labels = [("yes" if "moon" in text else "no", text) for text in sentences(24)]
    dev = write_examples(tmp_path / "dev.tsv", rows, ("score", "sentence1", "sentence2"))
    data = write_examples(tmp_path / "data.tsv", pairs(16)) if task == "contrastive" else dev
    if task == "classification":
        dev = data = write_examples(tmp_path / "labels.tsv", labels, ("label", "text"))
    command = ["train", "--task", task, "--data", data, "--dev", dev, "--model", tmp_path / "encoder", "--epochs", 2]
    command += ["--output", tmp_path / "out", "--device", "cpu", "--batch-size", 8, "--bottleneck", 4]
    assert main([str(argument) for argument in command]) == 0
    total = 24 if task == "classification" else 48
    said = re.findall(rf"dev: (\d+) of {total} texts", capsys.readouterr().err)
    assert said.count(str(total)) >= 2 and len(set(said)) > 1


def test_a_bar_on_a_terminal(callbacks, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert callbacks.on_terminal()
    bar = callbacks.Bar("eval_score")
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar.on_train_begin(None, state(40, 100), None)  # it goes on from a checkpoint
    now[0] = 30.0
    bar.on_step_end(None, state(70, 100), None)
    bar.on_log(None, state(70, 100, 0.5), None, {"loss": 0.25})
    # As the bars of texts; 30 steps took 30 seconds, and as many are left.
    assert re.search(r"\r70 of 100 steps .*, 00:30 left", terminal.getvalue())
    assert "epoch 0.50, step 70 of 100: loss 0.2500" in capsys.readouterr().out
    bar.on_train_end(None, state(100, 100), None)


@pytest.mark.parametrize("watched", [False, True])
def test_the_trainers_dictionaries_are_gone(callbacks, monkeypatch, watched):
    kept = []

    class Trainer:
        def remove_callback(self, kind):
            kept.append(f"-{kind.__name__}")

        def add_callback(self, one):
            kept.append(f"+{type(one).__name__}")

    monkeypatch.setattr(callbacks, "on_terminal", lambda: watched)
    callbacks.show(Trainer(), "eval_score")
    assert kept == ["-PrinterCallback", "-ProgressCallback", "+Bar" if watched else "+Lines"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


INTERRUPTED = {  # what is at work under a bar, of each way
    "contrastive": "tools.callbacks.Bar.on_log",
    "classification": "tools.callbacks.Bar.on_log",
    "frozen": "cache._summaries",
    "evaluate": "tools.evaluation._pooled",
    "predict": "transformers.S2SentForSequenceClassification.forward",
}


@pytest.mark.parametrize("way", INTERRUPTED)
def test_no_bar_follows_the_error(way, tmp_path, monkeypatch):
    """Whosever the bar is: the trainer's, or one that a generator has open. What is kept has a line of its own."""
    for name in ("datasets", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    save_encoder(tmp_path / "encoder")
    (tmp_path / "texts.txt").write_text("\n".join(sentences(40)))
    labels = [(part, "yes" if "moon" in text else "no", text) for part in ("train", "test") for text in sentences(40)]
    labels = write_examples(tmp_path / "labels.tsv", labels, ("split", "label", "text"))
    data = labels if way in ("classification", "predict") else write_examples(tmp_path / "data.tsv", pairs(40))
    train = [
        "train",
        "--data",
        data,
        "--epochs",
        1,
        "--batch-size",
        4,
        "--model",
        tmp_path / "encoder",
        "--device",
        "cpu",
    ]
    train += ["--task", "classification"] if data == labels else []
    frozen = [*train, "--freeze-encoder", "--cache", tmp_path / "cache", "--output", tmp_path / "trained"]
    command, kept = [*train, "--output", tmp_path / "out"], "nothing is kept: the first checkpoint is written"
    if way == "frozen":
        command, kept = frozen, "nothing is encoded yet: the same command begins anew"
    elif way == "evaluate":
        command, kept = ["evaluate", "--transfer", labels, "--model", tmp_path / "encoder", "--device", "cpu"], None
    elif way == "predict":
        assert main([str(argument) for argument in frozen]) == 0
        command, kept = ["predict", tmp_path / "texts.txt", "--model", tmp_path / "trained", "--device", "cpu"], None
        command += ["--output", tmp_path / "out.tsv"]

    def interrupt(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"s2sent_kernels.{INTERRUPTED[way]}", interrupt)
    monkeypatch.chdir(tmp_path)
    screen = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setattr(sys, "stdout", screen)
        assert main([str(argument) for argument in command]) == 130
        gc.collect()  # whatever ends with its bar has ended
    assert "\r" in screen.getvalue()
    *others, last = screen.getvalue().rstrip("\n").split("\n")
    assert last == "s2sent: error: interrupted"
    assert kept is None or others[-1].startswith(kept)


# ---------------------------------------------------------------- frozen trainings


def ends(pace, now, *epochs):
    for number, now[0] in epochs:
        pace(None, Epoch(number, number, 0.5, 1.0))


def test_an_epoch_that_lasts_is_told(now, capsys):
    with Pace([Recipe(epochs=4)], "scalar mix") as pace:
        now[0] = 3.0
        pace.lines.look()  # as its thread does
        ends(pace, now, (0, 4.0), (1, 7.0), (2, 13.0), (3, 20.0))
        now[0] = 24.0
        pace.lines.look()
    said = "scalar mix: epoch 1 of 4 ...\nscalar mix: epoch 3 of 4, 00:13 left\nscalar mix: epoch 4 of 4, 00:07 left\n"
    assert capsys.readouterr() == ("", said)


def test_trials_are_told_apart(now, capsys):
    """Also where patience ends one, with a dev part or without; an epoch that was printed was told."""
    recipes = [Recipe(epochs=3, seed=seed) for seed in range(3)]
    with Epochs(recipes, ("seed",)) as epochs:
        for recipe, *ended in ((recipes[0], 0, 1, 2), (recipes[1], 0, 1)):
            for number in ended:
                now[0] += 2.0
                epochs(recipe, Epoch(number, number, 0.5 if number else None, now[0]))
        now[0] += 10.0
        epochs.lines.look()
    assert capsys.readouterr().err == "trial 2 of 3, epoch 2 of 3, 00:17 left\n"
    assert [(line.trial["seed"], line.epoch) for line in epochs.history] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with Pace(recipes) as pace:
        ends(pace, now, (1, now[0] + 1), (2, now[0] + 2), (3, now[0] + 3), (1, now[0] + 20))
    said = "trial 1 of 3, epoch 3 of 3, 00:06 left\ntrial 2 of 3, epoch 2 of 3, 00:25 left\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("several, said", [(False, [1, 2, 3, 1, 2]), (True, [1, 3, 2])])
def test_of_several_trials_the_epochs_that_are_better_are_printed(now, capsys, several, said):
    """A line of each of 48 epochs hid the lines of the trials."""
    recipes = [Recipe(epochs=3, seed=seed) for seed in range(1 + several)]
    with Epochs(recipes, ("seed",)) as epochs:
        for scores in ((9.0, 1.0, float("nan"), 2.0), (9.0, 2.0, 3.0)):
            for number, score in enumerate(scores):
                epochs(recipes[0], Epoch(number, number, 0.5 if number else None, score))
    found = re.findall(r"epoch (\d): loss 0.5000, dev ", capsys.readouterr().out)
    assert list(map(int, found)) == said and len(epochs.history) == 7


def test_evaluate_says_what_it_fits(all_too_long, places, capsys, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = ["evaluate", "--transfer", places / "words.tsv", "--model", places / "model", "--device", "cpu"]
    assert main([str(argument) for argument in [*command, "--output-dir", tmp_path / "out"]]) == 0
    said = capsys.readouterr().err
    assert all(f"fitting classifiers behind {name} ...\n" in said for name in ("mean of last", "cls"))
