"""What a command says while it is silent, and how far a training with the encoder is. No clock runs here."""

import io
import sys
import types

import pytest
from builders import pairs, save_encoder, write_examples

from s2sent_kernels import waiting
from s2sent_kernels.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")


class Timer:
    """A timer whose time is up when the test says so."""

    made: list = []  # noqa: RUF012

    def __init__(self, seconds, function, arguments):
        self.seconds, self.end, self.running = seconds, lambda: function(*arguments), False
        self.made.append(self)

    def start(self):
        self.running = True

    def cancel(self):
        self.running = False


class Over(Timer):
    """Whatever is waited for takes too long."""

    def start(self):
        self.end()


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(Timer, "made", [])
    monkeypatch.setattr(waiting.threading, "Timer", Timer)
    return Timer


def test_a_silence_is_told_once_it_is_long(timer, capsys):
    with waiting.told("loading the encoder"):
        (one,) = timer.made
        assert one.running and one.daemon and one.seconds == waiting.SILENCE
        assert capsys.readouterr().err == ""
        one.end()
        assert capsys.readouterr().err == "loading the encoder ...\n"
    assert not one.running
    with pytest.raises(RuntimeError), waiting.told("more"):
        raise RuntimeError
    assert not timer.made[1].running


def test_nothing_is_said_unasked_or_to_nobody(timer, monkeypatch):
    with waiting.told("x", False):
        assert not timer.made[0].running
    monkeypatch.setattr(sys, "stderr", None)
    with waiting.told("x"):
        timer.made[1].end()


def test_commands_say_what_they_load(tmp_path, monkeypatch, capsys):
    """One place: the loaders of commands/common.py; and what a cache does before its first batch."""
    save_encoder(tmp_path / "encoder")
    data = write_examples(tmp_path / "data.tsv", pairs(8))
    monkeypatch.setattr(waiting.threading, "Timer", Over)
    command = ["train", "--data", data, "--model", tmp_path / "encoder", "--device", "cpu", "--epochs", 1]
    frozen = ["--freeze-encoder", "--cache", tmp_path / "cache", "--output", tmp_path / "selector"]
    assert main([str(argument) for argument in [*command, *frozen]]) == 0
    said = capsys.readouterr().err
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert [line for line in said.splitlines() if line.endswith(" ...")] == [
        f"loading {tmp_path / 'encoder'} ...",
        "computing the digest of the encoder's weights ...",
        f"waiting for another process that fills {cache} ...",
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


def test_lines_where_nobody_watches(callbacks, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(callbacks, "clock", lambda: now[0])
    lines = callbacks.Lines("eval_score", 100)
    lines.on_train_begin(None, state(20), None)  # it goes on from a checkpoint
    for step, now[0] in ((25, 20.0), (30, 30.0), (32, 45.0), (40, 120.0)):
        lines.on_step_end(None, state(step), None)
    assert capsys.readouterr() == ("", "step 30 of 100, 03:30 left\nstep 40 of 100, 06:00 left\n")
    now[0] = 140.0
    lines.on_log(None, state(50, epoch=1.0), None, {"loss": 0.5, "grad_norm": 1.0})
    lines.on_log(None, state(50, epoch=1.0), None, {"eval_score": 0.75})
    lines.on_log(None, state(50, epoch=1.0), None, {"train_runtime": 9.0})
    now[0] = 160.0  # something was said 20 seconds ago
    lines.on_step_end(None, state(55), None)
    wanted = "epoch 1.00, step 50 of 100: loss 0.5000\nepoch 1.00, step 50 of 100: dev 75.00\n"
    assert capsys.readouterr() == (wanted, "")


def test_the_time_left_is_said_soon(callbacks, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(callbacks, "clock", lambda: now[0])
    monkeypatch.setattr(waiting, "SILENCE", 3.0)
    lines = callbacks.Lines("eval_score", 100)
    lines.on_train_begin(None, state(0), None)
    for step, now[0] in ((1, 2.0), (2, 4.0), (3, 6.0), (10, 33.0), (17, 34.0)):
        lines.on_step_end(None, state(step), None)
    assert capsys.readouterr().err == "step 2 of 100, 03:16 left\nstep 17 of 100, 02:46 left\n"


def test_a_bar_on_a_terminal(callbacks, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert callbacks.on_terminal()
    bar = callbacks.Bar("eval_score")
    bar.on_train_begin(None, state(0, 4), None)
    bar.training_bar.fp = terminal
    bar.on_step_end(None, state(2, 4), None)
    bar.training_bar.refresh()
    bar.on_log(None, state(2, 4, 0.5), None, {"loss": 0.25})
    shown = terminal.getvalue()
    assert "2/4" in shown and "<" in shown  # tqdm's elapsed<left
    assert "epoch 0.50, step 2 of 4: loss 0.2500" in capsys.readouterr().out
    bar.on_train_end(None, state(4, 4), None)


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
