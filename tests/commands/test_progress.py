"""How far a command is: a bar where somebody watches standard error, else plain lines, since a bar returns the carriage and would
be one endless line of a log."""

import io
import json
import re
import struct
import subprocess
import sys

import pytest
from builders import TEXTS, make_encoder_and_tokenizer, pairs, save_encoder, sentences, write_examples

from s2sent_kernels import waiting
from s2sent_kernels.cli import main
from s2sent_kernels.tools import encoders

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from s2sent_kernels.tools import progress


@pytest.fixture(autouse=True)
def no_thread_looks(monkeypatch):
    """So that lines come where a batch ended."""
    monkeypatch.setattr(waiting, "LOOK", 1e6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def encode(monkeypatch, stderr, every):
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "PROGRESS_EVERY", every)
    encoder, tokenizer = make_encoder_and_tokenizer()
    rows = encoders.in_batches(range(len(TEXTS)), 2)
    batches = encoders.token_batches(encoder, tokenizer, TEXTS, rows, max_length=32, skip=1, progress=True)
    assert len(list(batches)) == len(rows) - 1
    return "" if stderr is None else stderr.getvalue()


def counts(said):
    """How many texts each line of progress tells of."""
    return [int(number) for number in re.findall(rf"^(\d+) of {len(TEXTS)} texts, .* left$", said, re.M)]


def test_lines_in_a_log(monkeypatch):
    said = encode(monkeypatch, io.StringIO(), every=0.0)
    assert counts(said) == [*range(4, len(TEXTS), 2), len(TEXTS)] and len(said.splitlines()) == len(counts(said))
    assert encode(monkeypatch, io.StringIO(), every=30.0) == ""  # it was done before the first was due
    assert encode(monkeypatch, None, every=0.0) == ""


def test_the_first_batch_is_told_while_it_lasts(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: now[0])
    monkeypatch.setattr(waiting, "SILENCE", 3.0)
    with progress.Progress(1000, bar=False) as shown:
        now[0] = 4.0
        shown.lines.look()
        assert capsys.readouterr().err == "0 of 1,000 texts ...\n"


@pytest.mark.parametrize("bar", [False, True])
def test_the_longest_first_say_nothing_of_the_others_time(monkeypatch, capsys, bar):
    """1,000 texts of 10 tokens on average, at 100 tokens a second: 100 seconds. The first ten have 100 tokens each."""
    now = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: now[0])
    with progress.Progress(1000, bar=bar) as shown:
        shown.expect(10.0)
        assert shown.left() is None
        now[0] = 10.0
        shown.advance(10, 1000)
        # By tokens 90 s; by texts, which count for the part that is done, 990 s.
        assert shown.left() == pytest.approx(90 + 900 * 10 / 1000)
        now[0] = 95.0
        shown.advance(980, 8500)
        # The texts' own rate wins in the end.
        assert shown.left() == pytest.approx(5 * 10 / 1000 + 95 / 99 * 990 / 1000)
    assert not bar or "990 of 1,000 texts" in capsys.readouterr().err


def test_what_predict_expects_is_told_by_a_sample(monkeypatch):
    seen = []
    monkeypatch.setattr(progress.Progress, "expect", lambda self, tokens: seen.append(tokens))
    monkeypatch.setattr(progress.Progress, "advance", lambda self, texts, tokens: seen.append((texts, tokens)))
    encoder, tokenizer = make_encoder_and_tokenizer()
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    rows = encoders.in_batches(encoders.longest_first(TEXTS), 4)
    list(encoders.token_batches(encoder, tokenizer, TEXTS, rows, max_length=32, progress=True))
    assert seen == [sum(lengths) / len(TEXTS), *((len(some), sum(lengths[row] for row in some)) for some in rows)]


@pytest.mark.parametrize("unit, seconds, speed", [("texts", 0.001, "1,000 texts/s"), ("steps", 16.91, "16.9 s a step")])
def test_numbers_in_bars_are_those_of_lines(monkeypatch, capsys, unit, seconds, speed):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = progress.drawn(20000, 0, unit)
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 100.0, 100.0
    now[0] += 1500 * seconds
    bar.update(1500)
    bar.refresh()
    bar.close()
    said = capsys.readouterr().err
    assert f"1,500 of 20,000 {unit} " in said and speed in said


def test_a_phase_without_a_bar_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: now[0])
    monkeypatch.setattr(waiting, "SILENCE", 3.0)
    lines = []
    ordinary = waiting.Lines.__enter__
    monkeypatch.setattr(waiting.Lines, "__enter__", lambda self: lines.append(self) or ordinary(self))
    for now[0] in progress.stepwise([0.0, 4.0, 5.0, 10.0], "planning", "files"):
        lines[0].look()
    assert capsys.readouterr().err == "planning: 1 of 4 files ...\nplanning: 3 of 4 files ...\n"


@pytest.mark.parametrize("bar", [False, True])
def test_the_time_left_is_that_of_what_is_encoded_now(monkeypatch, capsys, bar):
    """100 texts are of an earlier run, whose batches take 900 s to be found; then ten new texts take 10 s."""
    now = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress.Progress(200, 100, bar=bar) as shown:
        if bar:
            shown.bar._time = lambda: now[0]
            shown.bar.start_t = shown.bar.last_print_t = now[0]
        now[0] = 900.0
        shown.begin()
        now[0] = 910.0
        shown.advance(10, 50)
        if not bar:
            shown.lines.look()
        assert "01:30 left" in capsys.readouterr().err
        now[0] = 920.0
        shown.begin()  # between new batches it changes nothing
        shown.advance(10, 50)
        assert shown.start == 900.0


def test_a_bar_on_a_terminal(monkeypatch):
    said = encode(monkeypatch, Terminal(), every=0.0)
    assert "\r" in said and f"{len(TEXTS)} of {len(TEXTS)} texts" in said


@pytest.mark.parametrize("size, drawn", [((24, 80), True), ((0, 0), False), ((24, 0), False), ((0, 80), False)])
def test_a_terminal_without_a_size_gets_lines(monkeypatch, size, drawn):
    """As `docker -t` and some runners of CI have one: tqdm draws nothing there."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with open(controller, "rb", buffering=0) as screen, open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(progress, "PROGRESS_EVERY", 0.0)
        with progress.Progress(30) as shown:
            shown.advance(20, 40)
        stderr.flush()
        said = screen.read(4096).decode()
    assert ("\r0 of 30 texts " in said) == drawn
    assert (re.fullmatch(r"20 of 30 texts, .* left\r\n", said) is not None) != drawn


def test_evaluate_takes_all_rows_of_files_without_splits(places, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    header, *rows = (places / "sts.tsv").read_text().splitlines()
    lines = [line.partition("\t")[2] for line in (header, *rows)]
    (tmp_path / "whole.tsv").write_text("\n".join(lines) + "\n")
    command = ["evaluate", "--model", places / "model", "--device", "cpu", "--output-dir", tmp_path / "out", "--sts"]
    assert main([str(argument) for argument in [*command, tmp_path / "whole.tsv"]]) == 0
    assert f"{tmp_path / 'whole.tsv'}: no column split: all 9 pairs are scored\n" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["split"] is None and found["examples"] == {"whole": 9}
    assert main([str(argument) for argument in [*command, tmp_path / "whole.tsv", places / "sts.tsv", "--force"]]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["split"] == "test" and found["examples"] == {"whole": 9, "sts": 8}


def test_evaluate_tells_of_all_that_it_encodes(places, whole, tmp_path, monkeypatch, capsys):
    """Also of a model with its own selector, which encodes the texts once more."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    monkeypatch.setattr(progress, "PROGRESS_EVERY", 0.0)
    command = ["evaluate", "--sts", places / "sts.tsv", "--model", whole[0], "--device", "cpu", "--batch-size", 4]
    assert main([str(argument) for argument in [*command, "--output-dir", tmp_path]]) == 0
    found = re.findall(r"^(\d+) of (\d+) texts, .* left$", capsys.readouterr().err, re.M)
    assert found[:2] == [("4", "8"), ("8", "8")] and found[-1] == ("16", "16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders that commands made of an encoder: a classifier, and a selector's embeddings."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("trained")
    save_encoder(folder / "encoder")
    rows = [("yes" if "moon" in text else "no", text) for text in sentences(60)]
    write_examples(folder / "labels.tsv", rows, ("label", "text"))
    write_examples(folder / "pairs.tsv", pairs(16))
    command = ["train", "--freeze-encoder", "--model", folder / "encoder", "--device", "cpu", "--epochs", 1]
    command += ["--cache", folder / "cache", "--batch-size", 8]
    classifier = ["--task", "classification", "--data", folder / "labels.tsv", "--output", folder / "classifier"]
    assert main([str(argument) for argument in [*command, *classifier]]) == 0
    selector = ["--data", folder / "pairs.tsv", "--output", folder / "selector"]
    assert main([str(argument) for argument in [*command, *selector]]) == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    command = ["encode", folder / "texts.txt", "--model", folder / "encoder", "--selector", folder / "selector"]
    assert (
        main([str(argument) for argument in [*command, "--device", "cpu", "--output", folder / "index.parquet"]]) == 0
    )
    return folder


def test_predict_tells_how_far_it_is(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PROGRESS_EVERY", 0.0)
    command = ["predict", trained / "texts.txt", "--model", trained / "classifier", "--output", tmp_path / "out.tsv"]
    assert main([str(argument) for argument in [*command, "--device", "cpu", "--batch-size", 2]]) == 0
    assert counts(capsys.readouterr().err) == list(range(2, len(TEXTS) + 1, 2))


def test_search_tells_how_far_it_is_with_many_queries(trained, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PROGRESS_EVERY", 0.0)
    command = ["search", "--index", trained / "index.parquet", "--device", "cpu", "--top", 1]

    def said(count):
        assert main([str(argument) for argument in [*command, *sentences(count)]]) == 0
        return capsys.readouterr().err

    assert not re.search(r"\d texts", said(2))
    assert re.search(r"^200 of 200 texts, .* left$", said(200), re.M)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_in_a_log(frozen, tmp_path):
    pytest.importorskip("datasets")
    save_encoder(tmp_path / "encoder")
    command = ["train", "--data", write_examples(tmp_path / "data.tsv", pairs(16)), "--model", tmp_path / "encoder"]
    command += ["--output", tmp_path / "out", "--device", "cpu", "--batch-size", 8, "--epochs", 1]
    command += ["--freeze-encoder", "--cache", tmp_path / "cache"] if frozen else []
    run = [sys.executable, "-m", "s2sent_kernels.cli", *map(str, command)]
    done = subprocess.run(run, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    # Lines say what a slow machine waits for and how far it is, and how large the cache will be.
    known = re.compile(rb"cache: .*|.* \.\.\.|.* left")
    theirs = [line for line in done.stderr.split(b"\n") if line and not known.fullmatch(line)]
    assert not theirs and b"\r" not in done.stdout
